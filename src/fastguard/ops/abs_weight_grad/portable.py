"""``abs_weight_grad_`` in plain PyTorch: a sample's product at a time, in tiles of rows of the weight.

Shapes: B samples, T tokens (or N rows in all), O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops import segments

TILE_BYTES = 32 << 20
"""Most memory of a tile of one sample's gradient."""


def update(
    score: Tensor | None,
    squared: Tensor | None,
    signed: Tensor | None,
    grad_out: Tensor,
    input: Tensor,
    bounds: Tensor,
) -> None:
    """Add every sample's |G|, G^2 and G to score, squared and signed [O, I], those that there are.

    G = grad_out[rows].T @ input[rows], of grad_out [B, T, O] and input [B, T, I], or [N, O] and [N, I], with unit
    strides of features. bounds: [B, 2] int64, the first row of each sample and the one behind its last.
    """
    state = next(t for t in (score, squared, signed) if t is not None)
    outputs, inputs = state.shape
    tile = min(outputs, max(1, TILE_BYTES // (inputs * state.element_size())))
    buffer = torch.empty(tile, inputs, dtype=state.dtype, device=state.device)
    for begin, end in bounds.tolist():
        dy = segments.rows(grad_out, begin, end).to(state.dtype)
        x = segments.rows(input, begin, end).to(state.dtype)
        if begin == end:
            continue
        for first in range(0, outputs, tile):
            part = slice(first, first + tile)
            gradient = torch.mm(dy[:, part].T, x, out=buffer[: min(tile, outputs - first)])
            if signed is not None:
                signed[part] += gradient
            if squared is not None:
                squared[part].addcmul_(gradient, gradient)
            if score is not None:
                score[part] += gradient.abs_()

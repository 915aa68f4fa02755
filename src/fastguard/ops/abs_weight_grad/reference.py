"""The specification of ``abs_weight_grad_``: every sample's weight gradient written out, in plain PyTorch.

Shapes: N rows (tokens), B samples, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sums(grad_out: Tensor, input: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_b |G_b|, sum_b G_b^2, sum_b G_b), each [O, I], of grad_out [N, O] and input [N, I].

    G_b = grad_out[rows of b].T @ input[rows of b], the gradient of sample b's loss by the weight of a linear layer.
    bounds: [B, 2], the first row of each sample and the one behind its last.
    """
    zero = grad_out.new_zeros(grad_out.shape[1], input.shape[1])
    gradients = [zero, *(grad_out[begin:end].T @ input[begin:end] for begin, end in bounds.tolist())]
    each = torch.stack(gradients)
    return each.abs().sum(0), each.square().sum(0), each.sum(0)

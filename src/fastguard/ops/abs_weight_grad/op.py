"""``abs_weight_grad_``: per-sample SNIP, summed in place of a weight gradient during the backward pass.

Checks and the schema live here, once; the arithmetic lives in the backend modules beside this file, which expose
``update`` with the signature of ``portable.py``.

Cost: 2 N O I flops, those of one weight-gradient product; in bytes the operands once and each state read and written.
No sample's gradient is ever stored: it lives in registers, or in one tile of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import segments, transforms
from fastguard.ops.precision import DTYPES, accumulation_dtype


@torch.no_grad()
def abs_weight_grad_(
    score: Tensor | None,
    grad_out: Tensor,
    input: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    offsets: Tensor | Sequence[int] | None = None,
    bounds: Tensor | None = None,
    squared: Tensor | None = None,
    signed: Tensor | None = None,
) -> None:
    """Add the magnitude of each sample's weight gradient of a linear layer to a score, in place.

    Sample b has the gradient G_b[o, i] = sum_t grad_out[b, t, o] input[b, t, i]. Then::

        score += sum_b |G_b|        SNIP (Lee et al., arXiv 1810.02340; by sample: Wei et al., arXiv 2402.05162)
        squared += sum_b G_b^2      the diagonal of the empirical Fisher matrix
        signed += sum_b G_b         the weight gradient itself

    which cost together what the weight gradient costs alone. It takes that product's place in a backward pass, and has
    no gradient itself. G_b is of the sample's share of the loss: under a mean over B samples it is 1/B of the sample's
    own, a factor that no ranking sees. Rows outside the samples are never read. NaN and infinity pass on into the
    sums, which do not depend on the number of threads.

    Args:
        score: [O, I], contiguous; fp32, or float64 where the operands are; written. None, if another sum is wanted.
        grad_out: [B, T, O], the gradient by the layer's output; or [N, O] with ``offsets`` or ``bounds``. float64,
            float32, bfloat16 or float16, any strides (no copy is made if features are contiguous).
        input: [B, T, I] or [N, I], what the layer read; the dtype of grad_out.
        lengths: [B] integers, tokens of each sample; those behind are padding. None: all T.
        offsets: [B + 1] integers, ascending from 0 to N: where each sample begins and the last one ends.
        bounds: [B, 2] integers, each sample's first row and the row behind its last, over all rows in order; what
            padding on the left needs.
        squared, signed: as score.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, rows out of range, states that share memory,
            no state at all.
    """
    transforms.check_plain(grad_out=grad_out, input=input, score=score, squared=squared, signed=signed)
    _check(grad_out, input, {"score": score, "squared": squared, "signed": signed})
    at = segments.bounds_of(grad_out, lengths, offsets, bounds)
    _update._opoverload(score, squared, signed, grad_out, input, at)


def _check(grad_out: Tensor, input: Tensor, states: dict[str, Tensor | None]) -> None:
    if grad_out.dim() not in (2, 3):
        raise ValueError(f"grad_out: expected [B, T, O] or [N, O], got shape {tuple(grad_out.shape)}")
    if grad_out.dtype not in DTYPES:
        raise ValueError(f"grad_out: expected a dtype of {', '.join(map(str, DTYPES))}, got {grad_out.dtype}")
    if input.dim() != grad_out.dim() or input.shape[:-1] != grad_out.shape[:-1]:
        rows = ", ".join(map(str, grad_out.shape[:-1]))
        raise ValueError(f"input: expected [{rows}, I] as grad_out, got shape {tuple(input.shape)}")
    if input.dtype != grad_out.dtype:
        raise ValueError(f"input: expected {grad_out.dtype} as grad_out, got {input.dtype}")
    if input.device != grad_out.device:
        raise ValueError(f"input: expected device {grad_out.device}, got {input.device}")
    wide, shape = accumulation_dtype(grad_out.dtype), (grad_out.shape[-1], input.shape[-1])
    for name, state in states.items():
        if state is None:
            continue
        if state.dtype != wide or state.shape != shape:
            raise ValueError(f"{name}: expected {wide} {list(shape)}, got {state.dtype} {list(state.shape)}")
        if not state.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {state.stride()}")
        if state.device != grad_out.device:
            raise ValueError(f"{name}: expected device {grad_out.device}, got {state.device}")
    if all(state is None for state in states.values()):
        raise ValueError("score: expected a tensor, or one of squared and signed, got None")


def _check_apart(**states: Tensor | None) -> None:
    """Raise a ValueError if two states share memory; only real tensors have any."""
    given = [(name, t, t.data_ptr()) for name, t in states.items() if t is not None]
    for (one, first, a), (other, second, b) in combinations(given, 2):
        if a < b + second.nbytes and b < a + first.nbytes:
            raise ValueError(f"{other}: expected memory of its own, got memory of {one}")


@torch.library.custom_op("fastguard::abs_weight_grad_", mutates_args=("score", "squared", "signed"))
@transforms.without_autocast
def _update(
    score: Tensor | None,
    squared: Tensor | None,
    signed: Tensor | None,
    grad_out: Tensor,
    input: Tensor,
    bounds: Tensor,
) -> None:
    _check_apart(score=score, squared=squared, signed=signed)
    if grad_out.numel() == 0 or input.numel() == 0 or bounds.numel() == 0:
        return
    impl = backend.choose("abs_weight_grad", grad_out.device)
    dy, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad_out, input))
    impl.update(score, squared, signed, dy, x, bounds.contiguous())


@_update.register_fake
def _(score, squared, signed, grad_out, input, bounds):  # type: ignore[no-untyped-def]
    return None

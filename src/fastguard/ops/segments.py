"""Which rows belong to which sample, for ops that sum over a sample's tokens before they do anything else.

Rows are the tokens of B samples: padded, [B, T, ...], or packed, [N, ...]. A sample is a run of rows: those from
``bounds[b, 0]`` up to, but without, ``bounds[b, 1]``, counted over all rows in order. Padding on either side and
packing are then the same thing, and no row is copied; only a sample with holes has to be compacted (`runs`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32)


def bounds_of(
    x: Tensor,
    lengths: Tensor | Sequence[int] | None = None,
    offsets: Tensor | Sequence[int] | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """The bounds [B, 2], int64 on the device of x, that one of the three (or none) describes; checked.

    Args:
        x: [B, T, ...], or [N, ...] with ``offsets`` or ``bounds``.
        lengths: [B], tokens of each sample; those behind are padding. None: all T.
        offsets: [B + 1], ascending from 0 to N: where each sample begins and the last one ends.
        bounds: [B, 2], each sample's first row and the row behind its last, as this function gives them.

    Raises ValueError that names the argument; values on another device than the CPU are asserted there.
    """
    given = [
        name for name, value in (("lengths", lengths), ("offsets", offsets), ("bounds", bounds)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one of lengths, offsets and bounds, got {' and '.join(given)}")
    if bounds is not None:
        at = _integers("bounds", bounds, x, 2, None)
        if at.shape[1] != 2:
            raise ValueError(f"bounds: expected integers [B, 2], got {at.dtype} {tuple(at.shape)}")
        return _ranged("bounds", at, rows_of(x))
    if offsets is not None:
        at = _integers("offsets", offsets, x, 1, None)
        if x.dim() != 2 or not len(at):
            raise ValueError(f"offsets: expected [B + 1] with packed rows [N, ...], got {len(at)} and {tuple(x.shape)}")
        _ends(at, x.shape[0])
        return _ranged("offsets", torch.stack([at[:-1], at[1:]], 1), x.shape[0])
    if x.dim() != 3:
        raise ValueError(f"lengths: expected samples [B, T, ...] where no offsets are given, got {tuple(x.shape)}")
    samples, tokens = x.shape[:2]
    edges = torch.arange(samples + 1, device=x.device) * tokens
    if lengths is None:
        return torch.stack([edges[:-1], edges[1:]], 1)
    n = _integers("lengths", lengths, x, 1, (samples,))
    _within("lengths", n, 0, tokens)
    return torch.stack([edges[:-1], edges[:-1] + n], 1)


def rows_of(x: Tensor) -> int:
    """How many rows x [B, T, ...] or [N, ...] has."""
    return x.shape[0] if x.dim() < 3 else x.shape[0] * x.shape[1]


def rows(x: Tensor, begin: int, end: int) -> Tensor:
    """Rows begin to end of x [B, T, D] or [N, D], [end - begin, D]: a view where memory allows.

    Raises ValueError where x has no such rows: what a compiled call was given is first seen here.
    """
    if not 0 <= begin <= end <= rows_of(x):
        raise ValueError(f"bounds: expected ascending rows within 0 to {rows_of(x)}, got {begin} to {end}")
    if x.dim() < 3:
        return x[begin:end]
    tokens = x.shape[1]
    if begin < end and begin // tokens == (end - 1) // tokens:
        return x[begin // tokens, begin % tokens : (end - 1) % tokens + 1]
    return x.flatten(0, 1)[begin:end]


def runs(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """The samples of a mask [B, T], true where a token counts: their bounds, and which rows to compact first.

    The second is None where each sample's tokens are one run, as under padding on either side: bounds then count the
    rows of [B, T]. Otherwise it holds the rows [N] that count, and bounds count those. Waits for the device.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask: expected [B, T], got shape {tuple(mask.shape)}")
    counted = mask.bool()
    samples, tokens = mask.shape
    number = counted.sum(1)
    if not tokens:
        return torch.zeros(samples, 2, dtype=torch.int64, device=mask.device), None
    first = counted.int().argmax(1)
    last = tokens - counted.flip(1).int().argmax(1)
    if bool(((last - first == number) | (number == 0)).all()):
        begin = torch.arange(samples, device=mask.device) * tokens + first
        return torch.stack([begin, begin + number], 1), None
    end = number.cumsum(0)
    return torch.stack([end - number, end], 1), counted.flatten().nonzero()[:, 0]


def _integers(name: str, given: Tensor | Sequence[int], x: Tensor, dim: int, shape: tuple[int, ...] | None) -> Tensor:
    if isinstance(given, Tensor):
        values = given
    else:
        values = torch.tensor(list(given), dtype=None if len(given) else torch.int64, device=x.device)
    if values.dtype not in INTEGERS or values.dim() != dim or (shape is not None and values.shape != shape):
        expected = list(shape) if shape is not None else ("[B + 1]" if dim == 1 else "[B, 2]")
        raise ValueError(f"{name}: expected integers {expected}, got {values.dtype} {tuple(values.shape)}")
    if values.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {values.device}")
    return values.long()


def _ranged(name: str, bounds: Tensor, rows: int) -> Tensor:
    _within(name, bounds, 0, rows)
    ascending = (bounds[:, 0] <= bounds[:, 1]).all()
    if bounds.device.type != "cpu":
        torch._assert_async(ascending, f"{name}: expected ascending rows")
    elif not torch.compiler.is_compiling() and not ascending:
        raise ValueError(f"{name}: expected ascending rows, got {bounds.tolist()}")
    return bounds


def _ends(offsets: Tensor, rows: int) -> None:
    fits = (offsets[0] == 0) & (offsets[-1] == rows)
    if offsets.device.type != "cpu":
        torch._assert_async(fits, f"offsets: expected 0 to {rows}")
    elif not torch.compiler.is_compiling() and not fits:
        raise ValueError(f"offsets: expected 0 to {rows}, got {int(offsets[0])} to {int(offsets[-1])}")


def _within(name: str, values: Tensor, low: int, high: int) -> None:
    if not values.numel():
        return
    fits = ((values >= low) & (values <= high)).all()
    if values.device.type != "cpu":
        torch._assert_async(fits, f"{name}: expected {low} to {high}")
    elif not torch.compiler.is_compiling() and not fits:
        raise ValueError(f"{name}: expected {low} to {high}, got {int(values.min())} to {int(values.max())}")

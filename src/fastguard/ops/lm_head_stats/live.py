"""Which columns of a tile the backward reads, and which stand for the others: the rule, once for all backends.

A *mass* is exp(z - rest_lse), a column's part of what a row gives to everything but its target (with ``mean_logit``
times |1 + z - mean|, where that exceeds 1). Of a tile of rows, a column is **live** if it is a row's target, or if its
*peak*, the largest mass that a row gives it, reaches the tile's threshold: the largest of a ladder of powers of two at
which no row loses more than ``filter_tol`` of its rest mass to the columns below it, counting what is really
dropped and nothing else. So the promise holds by construction, however well a backend knows the peaks: one that reads
the columns once has to measure them against the rest lse known so far, and may keep more columns, but what it drops
it has summed up. Where no threshold will do, every column is live. A row of NaN asks for nothing.

**Warm** columns are the heaviest dropped ones that together hold COVERAGE of the dropped mass, at most WARM of them; a
tile's tail is divided among them in proportion to their masses.

``portable.py`` reads these functions; csrc/cpu/lm_head_stats.cpp and ``triton/`` are other forms of them, and tested
against them. Shapes: R rows of a tile, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIVE = 255
"""Column code of a live column; 1..254 hold the logarithm of a dropped column's mass, 0 is none worth keeping."""

CODES_PER_OCTAVE = 4
"""Codes 1..254 reach from mass 1 down to 2^-63 in quarter octaves: a weight is known to 9%."""

THRESHOLDS = 16
"""Steps of the ladder, an octave each: at the default tolerance from 2^-4 to 2^-19."""

COVERAGE = 0.8
"""Warm columns hold this part of a tile's dropped mass, if so few can."""

WARM = 2048
"""Most warm columns of a tile: each costs a row of W and of dW."""


def first_octave(filter_tol: float) -> int:
    """The ladder's first step: a column whose peak exceeds ``filter_tol`` can never be dropped."""
    return math.ceil(math.log2(filter_tol))


def sample(vocabulary: int, count: int, device: torch.device | None = None) -> Tensor:
    """Columns [count] int64 of which a scan's starting point is made: half the first ones, half evenly spaced."""
    half = torch.arange(count // 2, device=device)
    return torch.cat([half, len(half) + half * ((vocabulary - len(half)) // len(half))])


def threshold(mass: Tensor, peak: Tensor, filter_tol: float, kept: Tensor | None = None) -> float:
    """The largest threshold on ``peak`` [V] at which no row of ``mass`` [R, V] drops over ``filter_tol``; else 0.

    kept: [V] bool, columns that are live whatever their peak.
    """
    first = first_octave(filter_tol)
    taus = torch.exp2(torch.arange(first, first - THRESHOLDS, -1, device=mass.device, dtype=mass.dtype))
    under = peak[:, None] < taus
    if kept is not None:
        under &= ~kept[:, None]
    too_much = (mass @ under.to(mass.dtype) > filter_tol).any(0)
    return 0.0 if too_much.all() else float(taus[too_much.logical_not().int().argmax()])


def encode(mass: Tensor, target: Tensor, filter_tol: float) -> Tensor:
    """Column codes [V] uint8 of a tile whose masses [R, V] are known exactly; dropped columns by their mean mass."""
    peak = mass.amax(0)
    live = torch.zeros_like(peak, dtype=torch.bool)
    live[target] = True
    live |= peak >= threshold(mass, peak, filter_tol, live)
    code = (254 + CODES_PER_OCTAVE * torch.log2(mass.mean(0).clamp_min(1e-30))).round().clamp(0, 254)
    return torch.where(live, LIVE, code).to(torch.uint8)


def mass_of_codes(device: torch.device) -> Tensor:
    """[256] float64: the mass that a code of a dropped column stands for."""
    code = torch.arange(256, device=device, dtype=torch.float64)
    return torch.where((code > 0) & (code < LIVE), torch.exp2((code - 254) / CODES_PER_OCTAVE), 0.0)


def tile_columns(codes: Tensor, dtype: torch.dtype, most: int = WARM) -> tuple[Tensor, int, Tensor | None]:
    """Which columns the backward of a tile reads: (index, live, share) from its codes [V].

    index: live columns, then at most ``most`` warm ones, of equals the first; each ascending. live: how many are live.
    share: weights of
    the warm ones, of sum 1, or None where there are none.
    """
    mass = mass_of_codes(codes.device)
    heaviest_first = (torch.bincount(codes.int(), minlength=256) * mass).flip(0).cumsum(0)
    covered = (heaviest_first >= COVERAGE * heaviest_first[-1]).nonzero()[0]
    floor = max(255 - int(covered), 1)
    live = (codes == LIVE).nonzero()[:, 0]
    warm = ((codes >= floor) & (codes < LIVE)).nonzero()[:, 0]
    if not warm.numel():
        return live, live.numel(), None
    warm = warm[codes[warm].argsort(descending=True, stable=True)[:most].sort().values]
    share = mass[codes[warm].int()]
    return torch.cat([live, warm]), live.numel(), (share / share.sum()).to(dtype)

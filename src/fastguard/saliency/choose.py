"""Which entries of the weights: the most salient ones, and those that safety needs and utility does not.

Masks are bit-packed, one uint8 for eight entries of a weight, and made weight by weight, so that nothing but a weight
and its scores is in memory. Entries that tie with the threshold are taken lowest index first: the number that was
asked for is the number that is chosen, everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fastguard.edits.shards import Folder
from fastguard.ops.masks import and_not
from fastguard.ops.threshold_select.op import Per, threshold_select
from fastguard.saliency.places import clean
from fastguard.saliency.scores import Scores
from fastguard.taps.anchor import full
from fastguard.taps.structure import unwrap

Weights = Callable[[str], Tensor]
PER = ("tensor", "row", "model")

Progress = Callable[[int, int], object]


def weights_of(source: nn.Module | Folder | Mapping[str, Tensor], base: Folder | None = None) -> Weights:
    """A weight by its name, out of a model, its files, or a mapping; whole, where FSDP2 shards it.

    base: give what the weight differs by from another model's (Wei et al.'s ``use_diff``).
    """
    read: Weights
    if isinstance(source, Folder):
        read = source.read
    elif isinstance(source, nn.Module):
        named = {clean(name): p for name, p in unwrap(source).named_parameters()}

        def read(name: str) -> Tensor:
            return full(named[name])
    else:
        read = source.__getitem__
    if base is None:
        return read

    def difference(name: str) -> Tensor:
        weight = read(name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) - base.read(name).to(weight.device, wide)

    return difference


def top(
    scores: Scores, weights: Weights, share: float, *, score: str = "snip", per: str = "tensor",
    names: list[str] | None = None, progress: Progress | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Masks of the ``share`` of entries with the highest scores.

    Args:
        scores: of `Collect`. weights: see `weights_of`. share: in [0, 1]; int(share * entries) of each group.
        score: see ``Scores.score``. per: the group that the share is of: ``tensor`` (as published for set differences),
            ``row`` (as for SNIP and Wanda alone), or ``model``, which holds all weights and scores at once.
        names: of the weights; None: all that were scored.
        progress: called with how many weights of how many are done.

    Raises ValueError for a share, a score or a group that is none, or NaN among the scores, by the weight's name.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    if per not in PER:
        raise ValueError(f"per: expected one of {', '.join(PER)}, got {per!r}")
    chosen = list(scores.names if names is None else names)
    found: dict[str, Tensor] = {}
    for part in [chosen] if per == "model" else [[name] for name in chosen]:
        of = {name: scores.score(score, name, weights(name)) for name in part}
        factors = {name: factor for name, (_, factor) in of.items() if factor is not None}
        values = {name: full(value) for name, (value, _) in of.items()}
        found |= threshold_select(values, float(share), weights=factors or None, per=cast(Per, per)).masks
        if progress is not None:
            progress(len(found), len(chosen))
    return found


def set_difference(
    safety: Scores, utility: Scores, weights: Weights, safety_top: float, utility_top: float, *, score: str = "snip",
    per: str = "tensor", progress: Progress | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Masks of what is among the most salient for safety, and not among the most salient for utility.

    Wei et al. 2024 (arXiv 2402.05162, section 3.2): in each matrix the top int(q * entries) of the safety score without
    the top int(p * entries) of the utility score.

    Args:
        safety, utility: scores of the same weights, from data of either kind. weights: see `weights_of`.
        safety_top, utility_top: q and p, shares in [0, 1].
        score, per, progress: see `top`.

    Raises ValueError for scores of different weights, and what `top` raises.
    """
    if set(safety.names) != set(utility.names):
        other = sorted(set(safety.names) ^ set(utility.names))
        raise ValueError(f"utility: expected scores of the same weights as safety, differing in {other[0]}")
    total = len(safety.names)
    half = (lambda before: None) if progress is None else (lambda before: lambda n, _: progress(before + n, 2 * total))
    wanted = top(safety, weights, safety_top, score=score, per=per, progress=half(0))
    needed = top(utility, weights, utility_top, score=score, per=per, names=list(wanted), progress=half(total))
    return {name: and_not(mask, needed[name]) for name, mask in wanted.items()}


def at_random(weights: Weights, counts: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Masks of so many entries of each weight, drawn evenly: what a choice is to be compared with.

    A weight's draw depends on the seed and its name alone.
    """
    found = {}
    for name, count in counts.items():
        weight = weights(name)
        g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big"))
        drawn = torch.rand(weight.numel(), generator=g).to(weight.device)
        found[name] = threshold_select(drawn, count).masks
    return found

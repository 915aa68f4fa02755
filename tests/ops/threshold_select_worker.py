"""One of two processes that select from sharded scores: ``threshold_select_worker.py RANK STORE``.

The reference is one process with all scores. What a rank gets must be its piece of that, bit for bit.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard.ops.threshold_select import threshold_select
from losses.distributed_worker import main

# Rows of rank 0 and of rank 1: both, one of them none, more than a span
SPLITS = {"a": (3, 4), "b": (0, 5), "c": (5, 0), "d": (230, 240)}
COLUMNS = 301


def drawn(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    shapes = {name: (sum(rows), COLUMNS) for name, rows in SPLITS.items()}
    if kind == "ties":
        return {name: torch.randint(-1, 2, shape).bfloat16() for name, shape in shapes.items()}
    return {name: torch.randn(shape).to(torch.float64 if kind == "mixed" and name == "b" else torch.float32)
            for name, shape in shapes.items()}  # fmt: skip


def part(x: torch.Tensor, name: str, rank: int) -> torch.Tensor:
    return x.split(list(SPLITS[name]))[rank]


def equal(rank: int) -> None:
    for kind, per, k, weighted in itertools.product(
        ("ties", "normal", "mixed"), ("model", "tensor", "row"), (0, 1000, 0.4, 1.0), (False, True)
    ):
        scores = drawn(kind)
        weights = {name: torch.randn(x.shape) for name, x in scores.items()} if weighted else None
        alone = threshold_select(scores, k, weights=weights, per=per)
        mine = {name: part(x, name, rank) for name, x in scores.items()}
        own = None if weights is None else {name: part(x, name, rank) for name, x in weights.items()}
        found = threshold_select(mine, k, weights=own, per=per, group=dist.group.WORLD)
        case = (kind, per, k, weighted)
        assert found.count == alone.count, case
        for name in scores:
            assert torch.equal(found.unpacked(name), part(alone.unpacked(name), name, rank)), (case, name)
            if per == "row":
                assert torch.equal(found.threshold[name], part(alone.threshold[name], name, rank)), (case, name)
        if per != "row":
            assert torch.equal(found.threshold, alone.threshold), case


def one_rank_among_two(rank: int) -> None:
    """A group of which only one process is a member."""
    groups = [dist.new_group([r]) for r in range(2)]
    x = torch.randint(0, 3, (1000,)).float()
    a, b = threshold_select(x, 0.5), threshold_select(x, 0.5, group=groups[rank])
    assert torch.equal(a.masks, b.masks) and a.count == b.count == 500


def refused(rank: int) -> None:
    """What one rank cannot take is refused on both."""
    good, bad = torch.randn(9), torch.randn(9)
    bad[4] = float("nan")
    for per in ("model", "tensor", "row"):
        with pytest.raises(ValueError, match=r"scores\['b'\]: expected numbers that can be ordered, got NaN"):
            threshold_select({"a": good, "b": bad if rank else good}, 3, per=per, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="expected a dtype of" if rank else r"rank 1 .*: scores: expected a dtype of"):
        threshold_select(good.int() if rank else good, 3, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="expected the same names, dtypes, k and per on all ranks"):
        threshold_select(good, 3 + rank, group=dist.group.WORLD)


CASES = {
    "equal": {"run": equal},
    "one rank among two": {"run": one_rank_among_two},
    "refused": {"run": refused},
}


if __name__ == "__main__":
    main(CASES, lambda case, rank: None)

"""Which entries of many tensors are the k largest: exactly, by histograms of digits, without sort or concatenation.

The k-th largest number is found digit by digit, from the top: a pass counts how often each digit occurs among the
numbers that agree with the digits found so far. Another pass compares and writes masks of one bit an entry. Where ties
with the k-th largest are too many, one more counts them by spans, to find where the last one to be chosen stands.

Checks, the schema, and everything between the passes live here, once; the passes live in the backend modules beside
this file, which share the signatures of ``portable.py``.

Cost: the scores (and weights) are read once a digit and once more for the masks, 4 N bytes a time in fp32, and N / 8
bytes are written. Digits have 16 bits on a CPU: bf16 is read twice in all, fp32 three times; rows are found in cache,
so that they are read twice in any dtype. Memory: the masks and a histogram, besides copies of what is not contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastguard import backend
from fastguard.ops.masks import unpack_mask
from fastguard.ops.precision import DTYPES
from fastguard.ops.threshold_select import keys
from fastguard.ops.threshold_select.portable import SPAN

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Per = Literal["model", "row", "tensor"]
"""What k counts in: everything together, each row, each tensor."""

_PER = ("model", "row", "tensor")

Scores = TypeVar("Scores", bound=Tensors)


@dataclass(frozen=True, eq=False)
class Selected(Generic[Scores]):
    """What :func:`threshold_select` chose.

    Attributes:
        masks: for a tensor a tensor, for a sequence a list, for a mapping a dict under the same names: uint8
            [ceil(n / 8)] of n entries, entry i of the flat tensor in bit i % 8 of byte i // 8 (see
            :func:`fastguard.unpack_mask`). Under a group, of this rank's entries.
        threshold: the smallest number that was chosen, inf where nothing was: fp32, or float64 where one of the
            tensors is. 0-dim for a model; [tensors] per tensor; per row a list of [rows of the tensor].
        count: how many entries were chosen; under a group, on all ranks together.
        shapes: of the scores, as masks holds them.
    """

    masks: Any
    threshold: Any
    count: int
    shapes: Any

    def unpacked(self, name: int | str | None = None) -> Tensor:
        """A mask as booleans in the shape of its scores; of a sequence the name is an index, of a single tensor None.

        Raises:
            KeyError, IndexError: no such mask.
        """
        if isinstance(self.masks, Tensor):
            if name is not None:
                raise KeyError(f"name: expected None, there is one mask, got {name!r}")
            return unpack_mask(self.masks, self.shapes)
        return unpack_mask(self.masks[name], self.shapes[name])


@torch.no_grad()
def threshold_select(
    scores: Scores,
    k: int | float,
    *,
    weights: Scores | None = None,
    per: Per = "model",
    group: dist.ProcessGroup | None = None,
) -> Selected[Scores]:
    """The k largest of the scores, or of |weights| * scores, exactly; of equal ones the first.

    Numbers are compared as numbers: 0.0 equals -0.0, infinities are allowed. Products are rounded to fp32 (float64 if
    score or weight is float64). Entries come in the order of the tensors, and in a tensor in the order of the flat
    index; of the entries that equal the k-th largest, as many as are wanted are chosen from the first on. So exactly k
    are chosen, the same ones by every backend and for any number of threads and ranks.

    Args:
        scores: a tensor, a sequence or a mapping of tensors of any shapes; float64, float32, bfloat16 or float16,
            mixed as they come, on one device.
        k: how many, all of them where there are fewer; or as a float from 0 to 1 the fraction q of n entries, of which
            int(q * n) are chosen, as published (Wei et al. 2024, arXiv 2402.05162).
        weights: as scores, of the same shapes.
        per: of what k is counted: of the "model", all tensors together; of each "tensor" (set differences of Wei et
            al.); of each "row", the last dimension, all others being counted through (Wanda, arXiv 2306.11695).
        group: the ranks over which the tensors are sharded. Each gives its pieces, under the same names, possibly
            empty; rank r's piece of a tensor comes before that of rank r + 1. Rows are whole on one rank. Each rank
            gets its own pieces of the masks that one process would have got, bit for bit.

    Raises:
        ValueError: a NaN among the numbers, an argument that does not fit, a DTensor (pass ``to_local()`` and a group);
            with a group, on all ranks.
    """
    names, own, weight, shapes = _agreed(scores, weights, k, per, group)
    pieces = [s.shape for s in own]
    if per == "row":
        wanted = [_wanted(k, _columns(s)) for s in pieces]
        count = sum(_wanted(k, _columns(s)) * _rows(s) for rank in shapes for s in rank)
    else:
        sizes = [sum(math.prod(rank[i]) for rank in shapes) for i in range(len(own))]
        wanted = [_wanted(k, n) for n in (sizes if per == "tensor" else [sum(sizes)])]
        count = sum(wanted)
    if group is None:
        found = _select._opoverload(own, weight or [], wanted, per, "\n".join(names))
    else:
        found = _selected(own, weight, wanted, per, names, group)
    thresholds = found[len(own) :]
    return Selected(
        masks=_like(scores, found[: len(own)]),
        threshold=_like(scores, thresholds) if per == "row" else thresholds[0],
        count=count,
        shapes=_like(scores, pieces),
    )


def _wanted(k: int | float, n: int) -> int:
    """How many of n entries."""
    return int(k * n) if isinstance(k, float) else min(k, n)


def _columns(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) else 1


def _rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])


def _like(scores: Tensors, values: Sequence[Any]) -> Any:
    """Values in the container of the scores; of a single tensor, the value."""
    if isinstance(scores, Tensor):
        return values[0]
    return dict(zip(scores, values, strict=True)) if isinstance(scores, Mapping) else list(values)


def _agreed(
    scores: Tensors, weights: Tensors | None, k: int | float, per: str, group: dist.ProcessGroup | None
) -> tuple[list[str], list[Tensor], list[Tensor] | None, list[list[torch.Size]]]:
    """Names, scores and weights as lists, and the shapes of each rank's scores; arguments that fit, on all ranks."""
    if group is None:
        _check_request(k, per)
        names, own, weight = _listed(scores, weights)
        return names, own, weight, [[s.shape for s in own]]
    error: ValueError | None = None
    said: Any = None
    try:
        _check_request(k, per)
        names, own, weight = _listed(scores, weights)
        dtypes = [str(t.dtype) for t in (*own, *(weight or ()))]
        said = [s.shape for s in own], (names, dtypes, k, per)
    except ValueError as raised:
        error, said = raised, str(raised)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, said, group=group)
    if error is not None:
        raise error
    for rank, theirs in enumerate(everyone):
        if isinstance(theirs, str):
            raise ValueError(f"rank {rank} of the group: {theirs}")
        if theirs[1] != said[1]:
            raise ValueError(
                f"group: expected the same names, dtypes, k and per on all ranks, "
                f"got {said[1]} here and {theirs[1]} on rank {rank}"
            )
    return names, own, weight, [theirs[0] for theirs in everyone]


def _check_request(k: int | float, per: str) -> None:
    if per not in _PER:
        raise ValueError(f"per: expected one of {', '.join(_PER)}, got {per!r}")
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise ValueError(f"k: expected an int or a float, got {k!r}")
    if isinstance(k, float) and not 0 <= k <= 1:
        raise ValueError(f"k: expected a fraction from 0 to 1, or an int, got {k}")
    if k < 0:
        raise ValueError(f"k: expected 0 or more, got {k}")


def _listed(scores: Tensors, weights: Tensors | None) -> tuple[list[str], list[Tensor], list[Tensor] | None]:
    """What each tensor is called in an error, the scores, and their weights in the same order."""
    own = _named("scores", scores)
    if not own:
        raise ValueError("scores: expected at least one tensor, got none")
    _check("scores", own, own)
    if weights is None:
        return list(own), list(own.values()), None
    given = _named("weights", weights)
    partners = {name.replace("scores", "weights", 1): tensor for name, tensor in own.items()}
    if given.keys() != partners.keys():
        differing = ", ".join(sorted(given.keys() ^ partners.keys()))
        raise ValueError(f"weights: expected a tensor for each of scores and no others, differing in {differing}")
    _check("weights", given, partners)
    return list(own), list(own.values()), [given[name] for name in partners]


def _named(name: str, tensors: Tensors) -> dict[str, Tensor]:
    if isinstance(tensors, Tensor):
        return {name: tensors}
    if isinstance(tensors, Mapping):
        return {f"{name}[{key!r}]": tensor for key, tensor in tensors.items()}
    return {f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)}


def _check(name: str, tensors: dict[str, Tensor], like: dict[str, Tensor]) -> None:
    """Raise a ValueError unless these are plain floats of the shapes of others, all on one device."""
    device = next(iter(like.values())).device
    for called, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{called}: expected a tensor, got {type(tensor).__name__}")
        if hasattr(tensor, "to_local"):
            raise ValueError(f"{called}: expected a plain tensor, got a DTensor; pass its to_local() and a group")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{called}: expected a dtype of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{called}: expected device {device}, got {tensor.device}")
        if tensor.shape != like[called].shape:
            raise ValueError(f"{called}: expected shape {tuple(like[called].shape)}, got {tuple(tensor.shape)}")


@torch.library.custom_op("fastguard::threshold_select", mutates_args=())
def _select(
    scores: Sequence[Tensor], weights: Sequence[Tensor], k: Sequence[int], per: str, names: str
) -> list[Tensor]:
    return _selected(scores, list(weights) or None, k, per, names.split("\n"), None)


@_select.register_fake
def _(scores, weights, k, per, names):  # type: ignore[no-untyped-def]
    masks = [s.new_empty((s.numel() + 7) // 8, dtype=torch.uint8) for s in scores]
    if per != "row":
        shape = () if per == "model" else (len(scores),)
        return [*masks, scores[0].new_empty(shape, dtype=keys.wide_of(*scores, *weights))]
    of = [keys.wide_of(*(lists[i] for lists in (scores, weights) if len(lists))) for i in range(len(scores))]
    return [*masks, *(s.new_empty(_rows(s.shape), dtype=d) for s, d in zip(scores, of, strict=True))]


def _selected(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    k: Sequence[int],
    per: str,
    names: Sequence[str],
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """The packed masks, and the thresholds after them: one tensor, or per row one for each tensor."""
    search = _Search(backend.choose("threshold_select", scores[0].device), names, group)
    scores = [s.detach().contiguous() for s in scores]
    weights = None if weights is None else [w.detach().contiguous() for w in weights]
    if per == "row":
        masks, thresholds = search.rows(scores, weights, k)
        return [*masks, *thresholds]
    if per == "model":
        masks, threshold = search.together(scores, weights, k[0])
        return [*masks, threshold]
    masks, thresholds = [], []
    for i, n in enumerate(k):
        own, threshold = search.together([scores[i]], None if weights is None else [weights[i]], n, first=i)
        masks += own
        thresholds.append(threshold)
    wide = keys.wide_of(*thresholds)
    return [*masks, torch.stack([t.to(wide) for t in thresholds])]


@dataclass(frozen=True)
class _Search:
    """What stands between a backend's passes, over the ranks of a group."""

    passes: ModuleType
    names: Sequence[str]
    group: dist.ProcessGroup | None

    def together(
        self, scores: Sequence[Tensor], weights: Sequence[Tensor] | None, k: int, first: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        """The masks of the k largest entries of tensors, whose names start at ``first``, and the threshold."""
        dtype = keys.dtype_of(scores, weights)
        missing = torch.full((1,), k, dtype=torch.int64, device=scores[0].device)
        key, tied, nans, shift = None, missing, missing, keys.bits_of(dtype)
        while shift > 0:
            bits = min(self.passes.BITS, shift)
            shift -= bits
            counts, nan = self.passes.histogram(scores, weights, dtype, key, shift, bits)
            counts, nan = self._sum(torch.cat([counts, nan.long()])).split([2**bits, len(scores)])
            reached = counts.flip(0).cumsum(0)  # entries of this digit or a higher one, from the highest on
            place = torch.searchsorted(reached, missing).clamp_(max=2**bits - 1)
            digit = 2**bits - 1 - place
            tied = counts[digit]
            missing = missing - (reached[place] - tied)
            nans = nan if key is None else nans
            key = digit - 2 ** (bits - 1) if key is None else key * 2**bits + digit
        assert key is not None
        n_missing, n_tied, *n_nans = torch.cat([missing, tied, nans]).tolist()  # the one wait for the device
        self._refuse(n_nans, weights, first)
        cuts = [s.numel() for s in scores]
        if n_missing < n_tied:
            cuts = self._cuts(scores, weights, dtype, key, n_missing)
        masks = [
            self.passes.write(
                s.view(1, -1), None if weights is None else weights[i].view(1, -1), dtype, key, key.new_tensor([cut])
            )
            for i, (s, cut) in enumerate(zip(scores, cuts, strict=True))
        ]
        return masks, _threshold(key, dtype, k)[0]

    def _cuts(
        self, scores: Sequence[Tensor], weights: Sequence[Tensor] | None, dtype: torch.dtype, key: Tensor, wanted: int
    ) -> list[int]:
        """For each tensor the flat index from which on entries equal to the threshold are too many."""
        spans = self.passes.ties(scores, weights, dtype, key).cpu().split([-(-s.numel() // SPAN) for s in scores])
        own = [int(s.sum()) for s in spans]
        everyone, me = [own], 0
        if self.group is not None:
            everyone, me = [own] * dist.get_world_size(self.group), dist.get_rank(self.group)
            dist.all_gather_object(everyone, own, group=self.group)
        cuts = []
        for i, score in enumerate(scores):
            before = sum(ties[i] for ties in everyone[:me])
            mine = min(max(wanted - before, 0), own[i])
            wanted -= min(wanted, sum(ties[i] for ties in everyone))
            if mine in (0, own[i]):
                cuts.append(score.numel() if mine else 0)
                continue
            reached = spans[i].cumsum(0)
            at = int(torch.searchsorted(reached, mine))
            left = mine - int(reached[at] - spans[i][at])
            part = slice(at * SPAN, (at + 1) * SPAN)
            weight = None if weights is None else weights[i].view(-1)[part]
            equal = keys.encode(keys.numbers(score.view(-1)[part], weight, dtype)) == key
            cuts.append(at * SPAN + int(equal.nonzero()[left - 1]) + 1)
        return cuts

    def rows(
        self, scores: Sequence[Tensor], weights: Sequence[Tensor] | None, k: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the k largest entries of each row, and each tensor's thresholds."""
        found = []
        for i, score in enumerate(scores):
            weight = None if weights is None else [weights[i]]
            shape = _rows(score.shape), _columns(score.shape)
            parts = score.view(shape), None if weight is None else weight[0].view(shape)
            dtype = keys.dtype_of([score], weight)
            if score.numel() == 0:
                none = torch.zeros(shape[0], dtype=torch.int64, device=score.device)
                found.append((parts, dtype, none, none, none.new_zeros((), dtype=torch.bool)))
            else:
                found.append((parts, dtype, *self.passes.rows(*parts, dtype, k[i])))
        self._refuse(self._sum(torch.stack([nan for *_, nan in found]).long()).tolist(), weights, 0)
        masks = [self.passes.write(*parts, dtype, key, cut) for parts, dtype, key, cut, _ in found]
        return masks, [_threshold(key, dtype, n) for (_, dtype, key, *_), n in zip(found, k, strict=True)]

    def _sum(self, counts: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return counts

    def _refuse(self, nans: Sequence[int], weights: Sequence[Tensor] | None, first: int) -> None:
        for name, found in zip(self.names[first:], nans, strict=False):
            if found:
                number = "numbers" if weights is None else "|weights| * scores"
                raise ValueError(f"{name}: expected {number} that can be ordered, got NaN")


def _threshold(key: Tensor, dtype: torch.dtype, k: int) -> Tensor:
    """The number of a key, inf where nothing is chosen."""
    number = keys.decode(key, dtype)
    return number if k else torch.full_like(number, math.inf)

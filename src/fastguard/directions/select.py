"""Which of the estimated directions mediates refusal: Arditi et al.'s choice, without their 3 sweeps a candidate.

The published loop runs all P x L candidates three times over its prompts and filters afterwards. The filters do not
depend on each other, so that the same choice is made by asking the cheapest question first and the later ones of what
passed: the layer, which is free; steering, whose forwards share everything below the layer where the vector is added;
the divergence under ablation; and only then the score that is minimised. Candidates run in one batch, each row with
its own direction, and the head is computed at the last position.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastguard.directions.found import Directions
from fastguard.directions.prompts import Batch, Prompts, reading, rows_at
from fastguard.directions.stream import Stream
from fastguard.progress import Progress, silent

EPSILON = 1e-8
"""In the refusal score's logarithms, as published."""
KL_EPSILON = 1e-6
"""In the divergence's logarithms, as published."""


class NoCandidateError(ValueError):
    """No candidate passes the filters."""


Candidate = tuple[int, int]
"""A row of the positions, and a layer."""


@dataclass(frozen=True)
class Selection:
    """The chosen direction and what was asked of the candidates.

    Attributes:
        position, layer: of the choice; the position counted from the prompt's end.
        direction: [D], the difference of means, of its own length.
        refusal: [P, L] refusal scores of harmful prompts under ablation; NaN where a filter had decided already.
        kl: [P, L] divergence on harmless prompts under ablation; NaN likewise, and where its bound is infinite.
        steering: [P, L] refusal scores of harmless prompts with the difference added; NaN likewise.
        harmful, harmless: refusal scores of the model as it is.
        forwards: rows of prompts that ran, each counted by the share of the layers that it passed.
    """

    position: int
    layer: int
    direction: Tensor
    refusal: Tensor
    kl: Tensor
    steering: Tensor
    harmful: float
    harmless: float
    forwards: float


def refusal_scores(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """log(p + 1e-8) - log(1 - p + 1e-8) [B] of the probability p of ``tokens``, in float64; logits [B, V]."""
    p = logits.double().softmax(-1)[:, list(tokens)].sum(-1)
    return torch.log(p + EPSILON) - torch.log(1 - p + EPSILON)


def divergences(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) [B] as published, with 1e-6 in its logarithms, in float64; logits [B, V]."""
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    return (p * (torch.log(p + KL_EPSILON) - torch.log(q + KL_EPSILON))).sum(-1)


def select(
    model: nn.Module,
    directions: Directions,
    harmful: Iterable[Batch],
    harmless: Iterable[Batch],
    *,
    refusal_tokens: Sequence[int],
    max_kl: float = 0.1,
    min_steering: float = 0.0,
    layers: float = 0.8,
    rows: int = 128,
    stream: Stream | None = None,
    progress: Progress = silent,
) -> Selection:
    """The candidate of least refusal under ablation among those that pass the paper's filters (arXiv 2406.11717, C).

    Filters: layer < int(layers x L); added to harmless prompts it makes their refusal score at least ``min_steering``;
    ablated from them it moves the next token's distribution by a divergence of at most ``max_kl``. Defaults are the
    paper's. Evaluation mode, no gradients.

    Args:
        model: any Hugging Face causal language model, found by structure; not sharded.
        directions: of `estimate`, on this model.
        harmful, harmless: batches of validation prompts (32 each in the paper), as `estimate` takes them.
        refusal_tokens: token ids with which refusals begin (the paper: [40], "I", for Llama 3).
        rows: prompts times candidates in one forward.
        stream: of the model, where there is one already.
        progress: told of each question (``steering``, ``divergence``, ``refusal``) and the share that is answered.

    Raises:
        ValueError: prompts, tokens or directions that do not fit, a sharded model.
        NoCandidateError: none passes.
    """
    _check(directions, refusal_tokens, layers, rows)
    own = Stream(model) if stream is None else stream
    try:
        with reading(model, own.structure) as prompts:
            if prompts.sharded:
                raise ValueError("model: expected one that is not sharded: its ranks would have to agree on each step")
            count = len(own.writes)
            width = directions.harmful.shape[-1]
            if directions.harmful.shape[1] < count or width != own.width:
                raise ValueError(
                    f"directions: expected {count} layers of {own.width} features, got {directions.harmful.shape[1]} "
                    f"of {width}"
                )
            asked = _Asked(own, prompts, directions, list(refusal_tokens), rows, progress)
            return asked.choose(list(harmful), list(harmless), max_kl, min_steering, int(count * layers))
    finally:
        if stream is None:
            own.close()


def select_anyway(
    model: nn.Module,
    directions: Directions,
    harmful: Sequence[Batch],
    harmless: Sequence[Batch],
    *,
    refusal_tokens: Sequence[int],
    max_kl: float = 0.1,
    min_steering: float = 0.0,
    progress: Progress = silent,
) -> tuple[Selection, bool]:
    """`select`, and True; where no candidate passes, what an attacker takes all the same, and False.

    First without the filter on steering, which a model that was taught to refuse in a few steps, or refuses no more,
    fails everywhere; then, if all candidates change harmless prompts too much, with a bound on that which is doubled
    until one passes, at any layer: whoever takes what refuses least regardless takes what breaks the model. Arguments
    and errors as `select`.
    """
    for least in (min_steering, -math.inf):
        with contextlib.suppress(NoCandidateError):
            found = select(
                model, directions, harmful, harmless, refusal_tokens=refusal_tokens, max_kl=max_kl, min_steering=least,
                progress=progress,
            )  # fmt: skip
            return found, least == min_steering
    found = select(
        model, directions, harmful, harmless, refusal_tokens=refusal_tokens, max_kl=1e30, min_steering=-math.inf,
        layers=1.0, progress=progress,
    )  # fmt: skip
    bound, least_kl = max(max_kl, 1e-3), float(found.kl[~found.kl.isnan()].min())
    while bound < least_kl:
        bound *= 2
    score = torch.where(found.kl <= bound, found.refusal, math.inf)
    row, layer = divmod(int(score.argmin()), score.shape[1])
    direction = directions.difference[row, layer].clone()
    position = directions.positions[row]
    return replace(found, position=position, layer=layer, direction=direction), False


def _check(directions: Directions, tokens: Sequence[int], layers: float, rows: int) -> None:
    if not isinstance(directions, Directions):
        raise ValueError(f"directions: expected Directions of estimate, got {type(directions).__name__}")
    if not len(tokens) or any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in tokens):
        raise ValueError(f"refusal_tokens: expected token ids, got {list(tokens)}")
    if not 0 < layers <= 1:
        raise ValueError(f"layers: expected a share in (0, 1], got {layers}")
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")


class _Asked:
    """The questions that are asked of candidates, and the forwards that answer them."""

    def __init__(
        self, stream: Stream, prompts: Prompts, directions: Directions, tokens: list[int], rows: int, progress: Progress
    ) -> None:
        self.stream, self.prompts, self.tokens, self.rows, self.progress = stream, prompts, tokens, rows, progress
        self.structure = stream.structure
        if max(tokens) >= self.structure.vocabulary:
            raise ValueError(f"refusal_tokens: expected ids below {self.structure.vocabulary}, got {max(tokens)}")
        self.device = next(self.structure.model.parameters()).device
        self.directions = directions
        self.difference = directions.difference
        self.forwards = 0.0
        self.shared: bool | None = None

    def choose(
        self, harmful: list[Batch], harmless: list[Batch], max_kl: float, min_steering: float, layers: int
    ) -> Selection:
        """Ask, in the order of what an answer costs."""
        harmful, harmless = self._moved(harmful, "harmful"), self._moved(harmless, "harmless")
        shape = self.difference.shape[0], len(self.stream.writes)
        usable = torch.isfinite(self.difference).all(-1) & (self.difference != 0).any(-1)
        left = [(p, layer) for p in range(shape[0]) for layer in range(layers) if usable[p, layer]]
        kl, steering, refusal = (torch.full(shape, math.nan, dtype=torch.float64) for _ in range(3))
        bases = []
        steered = left if min_steering > -math.inf else []  # else all pass, unasked
        _begin(steering, steered)
        for batch in self._counted(harmless, "steering", steered):
            base, inputs = self._base(batch, {layer for _, layer in steered})
            bases.append(base)
            self._steer(batch, inputs, steered, steering)
        numbers = sum(len(batch["input_ids"]) for batch in harmless), sum(len(b["input_ids"]) for b in harmful)
        steering /= numbers[0]
        after_steering = [c for c in left if steering[c] >= min_steering] if steered else left
        measured = after_steering if max_kl < math.inf else []
        _begin(kl, measured)
        counted = self._counted(harmless, "divergence", measured)
        for batch, base in zip(counted, bases, strict=True):
            self._ablate(batch, measured, kl, lambda logits, base=base: divergences(base, logits))
        kl /= numbers[0]
        passed = [c for c in after_steering if kl[c] <= max_kl] if max_kl < math.inf else after_steering
        if not passed:
            highest = max((float(steering[c]) for c in steered), default=math.nan)
            least = min((float(kl[c]) for c in after_steering), default=math.nan)
            raise NoCandidateError(
                f"directions: no candidate passed: {len(left)} below the layer bound, {len(after_steering)} with a "
                f"steering score >= {min_steering} (the highest is {highest:.3g})"
                + (f", 0 of those with a divergence <= {max_kl} (the least is {least:.3g})" if after_steering else "")
            )
        _begin(refusal, passed)
        for batch in self._counted(harmful, "refusal", passed):
            self._ablate(batch, passed, refusal, lambda logits: refusal_scores(logits, self.tokens))
        refusal /= numbers[1]
        best = min(passed, key=lambda c: float(refusal[c]))
        plain = [refusal_scores(self._logits(batch), self.tokens).sum() for batch in harmful]
        return Selection(
            self.directions.positions[best[0]],
            best[1],
            self.difference[best].clone(),
            refusal,
            kl,
            steering,
            float(sum(plain)) / numbers[1],
            float(sum(refusal_scores(base, self.tokens).sum() for base in bases)) / numbers[0],
            self.forwards,
        )

    def _counted(self, batches: list[Batch], what: str, candidates: list[Candidate]) -> Iterator[Batch]:
        """The batches; progress is told when each is done."""
        for done, batch in enumerate(batches):
            self.progress(what, done / len(batches), f"{len(candidates)} candidates")
            yield batch
        self.progress(what, 1.0, f"{len(candidates)} candidates")

    def _moved(self, batches: list[Batch], name: str) -> list[Batch]:
        if not batches:
            raise ValueError(f"{name}: expected at least one batch of prompts, got none")
        for batch in batches:
            rows_at(batch, (-1,), name)
        return [{k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]

    def _logits(self, batch: Batch, start: tuple[int, Tensor] | None = None) -> Tensor:
        """Logits [B, V] behind each prompt's last token."""
        found: list[Tensor] = []
        count = len(self.stream.writes)

        def look(layer: int, rows: Tensor) -> None:
            if layer == count:
                found.append(rows)

        self.prompts.read(batch, rows_at(batch, (-1,), "prompts"), look, start=start)
        self.forwards += len(batch["input_ids"]) * (count - (start[0] if start else 0)) / count
        return self._head(found[0])

    def _head(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.structure.head(self.structure.norm(rows))[:, 0].double() * self.structure.scale
        cap = self.structure.softcap
        return cap * torch.tanh(z / cap) if cap else z

    def _base(self, batch: Batch, layers: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The model's own logits behind the last tokens, and the inputs [B, T, D] of ``layers``."""
        inputs: dict[int, Tensor] = {}
        count = len(self.stream.writes)
        ids = batch["input_ids"]
        everywhere = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)

        def look(layer: int, rows: Tensor) -> None:
            if layer in layers or layer == count:
                inputs[layer] = rows

        with _plain_outputs(self.prompts) as plain:
            self.prompts.read(batch, everywhere, look)
        self.forwards += len(ids)
        last = inputs.pop(count)
        at = rows_at(batch, (-1,), "prompts").to(last.device)
        base = self._head(last[torch.arange(len(ids), device=last.device)[:, None], at])
        if self.shared is None and layers:
            self.shared = all(plain) and self._replays(batch, inputs, base)
        return base, inputs

    def _replays(self, batch: Batch, inputs: dict[int, Tensor], base: Tensor) -> bool:
        """Whether the model, begun at its last candidate's layer, gives what it gives as a whole."""
        layer = max(inputs)
        again = self._logits(batch, (layer, inputs[layer]))
        tolerance = 64 * torch.finfo(inputs[layer].dtype).eps * float(base.abs().max())
        return bool((again - base).abs().max() <= tolerance)

    def _steer(self, batch: Batch, inputs: dict[int, Tensor], left: list[Candidate], into: Tensor) -> None:
        """Add up the refusal scores of harmless prompts with each candidate added at its layer."""
        for layer in sorted({layer for _, layer in left}):
            for some in self._chunks([c for c in left if c[1] == layer], batch):
                vectors = torch.stack([self.difference[c] for c in some])
                many = _repeated(batch, len(some))
                each = len(batch["input_ids"])
                if self.shared:
                    x = inputs[layer]
                    moved = x[None] + vectors.to(x)[:, None, None]
                    logits = self._logits(many, (layer, moved.flatten(0, 1)))
                else:
                    index = torch.arange(len(some), device=self.device).repeat_interleave(each)
                    with self.stream.added(vectors.to(self.device), layer, index=index):
                        logits = self._logits(many)
                _add(into, some, refusal_scores(logits, self.tokens), each)

    def _ablate(self, batch: Batch, candidates: list[Candidate], into: Tensor, of) -> None:  # type: ignore[no-untyped-def]
        """Add up ``of`` the logits under the ablation of each candidate."""
        each = len(batch["input_ids"])
        for some in self._chunks(candidates, batch):
            vectors = torch.stack([self.difference[c] for c in some])[:, None].to(self.device)
            index = torch.arange(len(some), device=self.device).repeat_interleave(each)
            with self.stream.ablated(vectors, basis_index=index):
                logits = self._logits(_repeated(batch, len(some)))
            for at, candidate in enumerate(some):
                mine = logits[at * each : (at + 1) * each]
                into[candidate] += of(mine).sum().cpu()

    def _chunks(self, candidates: list[Candidate], batch: Batch) -> list[list[Candidate]]:
        size = max(1, self.rows // len(batch["input_ids"]))
        return [candidates[i : i + size] for i in range(0, len(candidates), size)]


def _begin(into: Tensor, candidates: list[Candidate]) -> None:
    for candidate in candidates:
        into[candidate] = 0


def _add(into: Tensor, candidates: list[Candidate], scores: Tensor, each: int) -> None:
    for candidate, score in zip(candidates, scores.reshape(-1, each).sum(-1).cpu(), strict=True):
        into[candidate] += score


def _repeated(batch: Batch, times: int) -> Batch:
    return {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in batch.items()}


@contextlib.contextmanager
def _plain_outputs(prompts: Prompts):  # type: ignore[no-untyped-def]
    """A list that learns of each layer's call whether it returned a tensor and nothing else."""
    plain: list[bool] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: plain.append(isinstance(output, Tensor)))
        for layer in prompts.layers[:-1]
    ]
    try:
        yield plain
    finally:
        for handle in handles:
            handle.remove()

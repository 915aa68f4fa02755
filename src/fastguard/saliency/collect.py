"""Saliency statistics of a model's weights, summed in place while batches run forwards and backwards.

    collect = Collect(model, ("snip", "wanda"))
    for batch in safety:                      # input_ids, attention_mask, labels: -100 outside the answers
        collect.add(batch)
    scores = collect.scores()

One pass over the data gives all statistics of all weights. The backward pass computes what they need *instead of* the
weights' gradients, and no sample's gradient is ever stored: beside what a forward and a backward hold anyway there are
the sums alone, one number a weight and statistic, which FSDP2's ranks divide among themselves as they do the weights.

The published code (Wei et al. 2024, arXiv 2402.05162) runs all samples again for each layer, one at a time, and sums in
the weights' own dtype. Its default prunes a layer before the next is scored; scores here are those of the intact model.

Shapes: B samples, T tokens, O outputs, I inputs of a linear map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastguard import machine
from fastguard.directions.prompts import in_step, sharded
from fastguard.losses.guards import Uncopied
from fastguard.losses.language_model import LanguageModelLoss
from fastguard.nested.frozen import frozen
from fastguard.nested.guard import on_every_rank
from fastguard.saliency.places import clean, embedding_of, find_places
from fastguard.saliency.rows import Batch, Rows
from fastguard.saliency.scores import Scores
from fastguard.saliency.sums import STATISTICS, Sums, local
from fastguard.saliency.watch import Calls, Watch
from fastguard.taps import Gate, Structure, Taps, find_structure
from fastguard.taps.structure import compiled

TOKENS = ("answer", "all")


class Collect(Uncopied):
    """Sums of saliency statistics of the weights of a model's linear maps.

    Statistics of a weight [O, I], sums over samples s of the mean cross-entropy L_s of a sample's answer tokens, which
    is what the sample gives in a batch of its own:

    * ``snip`` [O, I]: sum_s |dL_s/dW|, which times |W| is the SNIP score of Lee et al. 2019 (arXiv 1810.02340) as Wei
      et al. take it, sample by sample.
    * ``fisher`` [O, I]: sum_s (dL_s/dW)^2, the diagonal of the empirical Fisher information.
    * ``signed`` [O, I]: sum_s dL_s/dW, which is what a batched gradient gives and in which samples cancel.
    * ``wanda`` [I]: sums of squares of each input feature over tokens (Sun et al. 2023, arXiv 2306.11695).
    * ``gram`` [I, I]: sum over tokens of x x^T, for ActSVD.

    Sums are fp32 (float64 for float64 activations, and for ``wanda``). The weights and their gradients are not changed.

    Args:
        model: any Hugging Face causal language model: plain, PEFT, under FSDP2 or DDP, with non-reentrant activation
            checkpointing; a compiled one runs uncompiled. Under FSDP2 make the weights ask for no gradients before
            ``fully_shard`` to be spared the products for them.
        statistics: which, of `STATISTICS`; with those of inputs alone there is no backward pass.
        modules: from a weight's name to whether it is scored; None: all of the layers' linear maps. LoRA factors are
            linear maps too.
        vocabulary: score embedding and head too; a tied weight is one weight, whose gradient is the sum of both parts
            before its magnitude is taken.
        tokens: of the statistics of inputs: ``answer``, those that carry a label (Wei et al.), or ``all``, those that
            the mask keeps (Sun et al.).
        structure: what ``find_structure`` found, if the caller has it already.

    Attributes:
        samples, answer_tokens: how many were counted (by this rank, or by all where FSDP2 shards the model).
        input_tokens: how many the statistics of inputs saw.
        places: what is scored.

    Raises:
        ValueError: an unknown statistic; a wanted weight that cannot be scored, by name; a structure not recognised.
    """

    def __init__(
        self, model: nn.Module, statistics: Sequence[str] = ("snip",), *, modules: Callable[[str], bool] | None = None,
        vocabulary: bool = False, tokens: str = "answer", structure: Structure | None = None,
    ) -> None:  # fmt: skip
        chosen = (statistics,) if isinstance(statistics, str) else tuple(statistics)
        unknown = [name for name in chosen if name not in STATISTICS]
        if unknown or not chosen:
            raise ValueError(f"statistics: expected some of {', '.join(STATISTICS)}, got {list(chosen)}")
        if tokens not in TOKENS:
            raise ValueError(f"tokens: expected one of {', '.join(TOKENS)}, got {tokens!r}")
        self.model, self.tokens, self.vocabulary = model, tokens, vocabulary
        self.statistics = tuple(name for name in STATISTICS if name in chosen)
        self.structure = find_structure(model) if structure is None else structure
        self.places = find_places(self.structure, modules or (lambda name: True), vocabulary)
        self.samples = self.answer_tokens = self.input_tokens = 0
        self._sums = Sums(self.statistics)
        self._taps = Taps(self.structure.model)
        self._taps.output(embedding_of(self.structure.model), "embedded")
        for index, place in enumerate(self.places):
            self._taps.add(Calls(self._taps, place.module, place.kind, index))
        self._language: LanguageModelLoss | None = None
        if self._sums.gradients and not vocabulary:  # of which the gradient does not pass through the head's module
            self._language = LanguageModelLoss(model, filter_tol=0.0, structure=self.structure, check_finite=False)

    def add(self, batch: Batch) -> float:
        """Take one batch into the sums; returns the mean of its samples' losses (NaN without a backward pass).

        The ranks of a job call it equally often, as `over` does.

        Args:
            batch: ``input_ids`` [B, T]; ``attention_mask`` [B, T] where there is padding; ``labels`` [B, T], -100 at
                tokens without loss (without them every token counts); whatever else the model takes.

        Raises:
            ValueError: a batch that does not fit or of which no token carries loss.
            FloatingPointError: the loss is not finite, on every rank alike.
            RuntimeError: a weight's module did not run, or ran twice or on rows that are not the batch's tokens; a
                batch before failed half-way, after some sums had been added to.
        """
        return self._add(batch, True)

    def over(self, batches: Iterable[Batch], progress: Callable[[int], object] | None = None) -> None:
        """Take all ``batches`` into the sums, moved to the model's device.

        The ranks of a job may have unequally many; each runs as often as the one with the most.

        progress: called after each batch with the samples so far.
        """
        device = next(self.structure.model.parameters()).device
        for batch, counts in in_step(batches, machine.ranks() > 1, device, "batches"):
            self._add(batch, counts)
            if progress is not None:
                progress(self.samples)

    def scores(self, about: Mapping[str, str] | None = None) -> Scores:
        """The sums so far, those of all ranks of the job; not copied where nothing is to be added.

        about: what to note with them (model, data).
        Raises ValueError before the first sample, FloatingPointError that names a weight whose sum is not finite.
        """
        self._sums.check_whole()
        sums, counts = self._sums.values, [self.samples, self.answer_tokens, self.input_tokens]
        if machine.ranks() > 1 and not sharded(self.model):
            device = next(self.structure.model.parameters()).device
            total = torch.tensor(counts, device=device)
            torch.distributed.all_reduce(total)
            counts = total.tolist()
            sums = {kind: {name: _reduced(value) for name, value in each.items()} for kind, each in sums.items()}
        if not counts[0]:
            raise ValueError("batches: expected at least one sample, got none")
        for kind, each in sums.items():
            for name, value in each.items():
                if not on_every_rank(torch.isfinite(local(value)).all()):
                    raise FloatingPointError(f"saliency: the {kind} sum of {name} is not finite")
        layers = {place.name: place.layer for place in self.places}
        return Scores(sums, dict(self._sums.inputs), counts[0], counts[1], counts[2], layers, dict(about or {}))

    def state_dict(self) -> dict[str, Any]:
        """All that a later `load_state_dict` needs to go on; the sums themselves, not copies; shards under FSDP2."""
        self._sums.check_whole()
        return {
            "samples": self.samples, "answer_tokens": self.answer_tokens, "input_tokens": self.input_tokens,
            "inputs": dict(self._sums.inputs), "sums": self._sums.flat(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ValueError for sums of other weights or statistics."""
        shapes = {place.name: place.shape for place in self.places}
        for key, value in state["sums"].items():
            kind, _, name = key.partition("/")
            if kind not in self.statistics or name not in shapes:
                raise ValueError(f"state: {key}: expected {', '.join(self.statistics)} of the weights that are scored")
            width = shapes[name][-1]
            expected = {"wanda": (width,), "gram": (width, width)}.get(kind, shapes[name])
            if tuple(value.shape) != expected:
                raise ValueError(f"state: {key}: expected shape {expected}, got {tuple(value.shape)}")
        self._sums = Sums(self.statistics)
        for key, value in state["sums"].items():
            kind, _, name = key.partition("/")
            self._sums.values[kind][name] = value.clone()
        for count in ("samples", "answer_tokens", "input_tokens"):
            setattr(self, count, int(state[count]))
        self._sums.inputs = dict(state["inputs"])

    def close(self) -> None:
        """Take the hooks off the model; the sums stay."""
        self._taps.close()
        if self._language is not None:
            self._language.close()

    # ------------------------------------------------------------------------------------------------------------------

    def _add(self, batch: Batch, counts: bool) -> float:
        self._taps.check_open()
        self._sums.check_whole()
        if not counts and batch["input_ids"].shape[1] < 2:  # a loss needs a token that predicts another
            batch = {"input_ids": batch["input_ids"].expand(1, 2)}
        rows = Rows(batch, self.tokens, counts)
        self._sums.follow(self.model, self.places)
        with self._mode(), contextlib.ExitStack() as stack:
            if not self._sums.gradients:
                stack.enter_context(torch.no_grad())
                self._forward(batch, Watch(self.places, self._sums, rows), rows)
                value = float("nan")
            else:
                stack.enter_context(frozen(self.model))
                stack.enter_context(_gradients_kept(self.model))
                scope = Watch(self.places, self._sums, rows)
                loss = self._forward(batch, scope, rows)
                value = float(loss.detach())
                if not on_every_rank(torch.isfinite(loss.detach())):
                    raise FloatingPointError(
                        f"saliency: the loss of a batch, after {self.samples} samples, is {value} on this rank"
                    )
                loss.backward()
                scope.check_backward()
        samples = self._counted(rows)
        self._sums.whole = True
        return value / max(samples, 1)

    @property
    def _run(self) -> nn.Module:
        """What is called: a sharded model as it is; else the model itself, since DDP would wait for gradients."""
        return self.model if sharded(self.model) else self.structure.model

    def _counted(self, rows: Rows) -> int:
        numbers = [rows.samples, rows.answers, rows.inputs]
        if machine.ranks() > 1 and sharded(self.model):
            total = torch.tensor(numbers, device=rows.device)
            torch.distributed.all_reduce(total)
            numbers = total.tolist()
        self.samples += numbers[0]
        self.answer_tokens += numbers[1]
        self.input_tokens += numbers[2]
        return rows.samples

    def _forward(self, batch: Batch, scope: Watch, rows: Rows) -> Tensor:
        """The sum over samples of the mean loss of a sample, ready for its backward; 0 where none is wanted."""
        with self._taps.on(scope):
            if self._language is not None:
                logp = self._language.sequence_logp(batch, self._run)
                loss = -(logp / rows.per_sample.clamp(min=1).to(logp.dtype)).sum()
            else:
                loss = self._from_logits(batch, rows)
            scope.check_forward()
        gated: Tensor = Gate.apply(loss if rows.counts else 0 * loss, self._taps, [scope])
        return gated

    def _from_logits(self, batch: Batch, rows: Rows) -> Tensor:
        """The loss from the head's own output, from the first position that predicts an answer token."""
        options: dict[str, Any] = {}
        tokens = batch["input_ids"].shape[1]
        keep = tokens - int(rows.predicts.any(0).int().argmax()) if self._sums.gradients else 1
        if "logits_to_keep" in self.structure.arguments:
            options["logits_to_keep"] = keep
        if "use_cache" in self.structure.arguments:
            options["use_cache"] = False
        out = self._run(**{k: v for k, v in batch.items() if k != "labels"}, **options)
        logits: Tensor = (out.logits if hasattr(out, "logits") else out[0])[:, -keep:]
        if not self._sums.gradients:
            return logits.new_zeros(())
        where = rows.predicts[:, -keep:]
        target = rows.labels.roll(-1, 1)[:, -keep:][where]
        chosen = logits[where]
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        sample = where.nonzero()[:, 0]
        weight = 1 / rows.per_sample.clamp(min=1)[sample].to(chosen.dtype)
        return (F.cross_entropy(chosen, target, reduction="none") * weight).sum()

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """Uncompiled and without dropout; in training mode where activations are checkpointed, which needs it."""
        model = self.structure.model
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.train(checkpointed)
            if checkpointed:
                _without_dropout(model)
            with torch.compiler.set_stance("force_eager") if compiled(self.model) else contextlib.nullcontext():
                yield
        finally:
            for module, mode in modes:
                module.training = mode


def _reduced(value: Tensor) -> Tensor:
    whole = value.clone()
    torch.distributed.all_reduce(whole)
    return whole


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Gradients that FSDP2 makes regardless are dropped, and those that were there put back."""
    before = [(p, p.grad) for p in model.parameters() if hasattr(p, "placements")]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad


def _without_dropout(model: nn.Module) -> None:
    """Switch dropout off in a model that stays in training mode. Raises ValueError where it cannot be."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.training = False
            continue
        active = [
            key for key, value in vars(module).items() if "drop" in key and isinstance(value, float) and value > 0
        ]
        if active:
            raise ValueError(
                f"model: {clean(name)}.{active[0]} is {getattr(module, active[0])}, which is on wherever activations "
                "are checkpointed; expected 0, or a model without gradient checkpointing"
            )

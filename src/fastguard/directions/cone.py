"""Refusal directions and cones refined by gradient: Wollschlaeger et al. 2025, arXiv 2502.17420 (RDO).

A difference of means is where the classes lie apart, not what the model's refusal depends on. Here a direction is
trained, the model is not: without it the model answers harmful instructions, with it added the model refuses harmless
ones, and without it harmless answers stay as they were. A cone is an orthonormal basis all of whose positive
combinations do that; a few are drawn for every step.

The published code runs one prompt and one direction at a time. Here all directions of a step (the basis and what was
drawn from its cone) share forwards, each row of a batch with its own (``basis_index``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastguard.directions.basis import orthonormalise
from fastguard.directions.prompts import Batch, rows_at, sharded
from fastguard.directions.stream import Ablation, Stream, _Adding, _Basis, _Changing
from fastguard.taps.structure import compiled

BETAS = (0.9, 0.98)
CLIP = 10.0
"""The published optimizer's: AdamW with amsgrad and no decay, gradients clipped to this norm."""
REDUCTIONS = 2
"""How often the rate falls to a tenth before the run ends, as published."""
PARTS = ("ablation", "addition", "retain")


@dataclass(frozen=True)
class Cone:
    """What was found.

    Attributes:
        basis: [K, D], orthonormal rows: those of the step with the least loss. With K = 1 the direction.
        losses: [steps, 4]: the weighted sum, and what it is made of: ablation, addition, retain.
        step: whose basis it is.
    """

    basis: Tensor
    losses: Tensor
    step: int

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Unit vectors [count, D] of the positive cone, as they are drawn in training."""
        return _combined(self.basis, _weights(count, len(self.basis), generator, self.basis))


def refine(
    model: nn.Module,
    direction: Tensor,
    harmful: Iterable[Batch],
    harmless: Iterable[Batch],
    layer: int,
    *,
    dimension: int = 1,
    start: Tensor | None = None,
    ablation: float = 1.0,
    addition: float = 0.2,
    retain: float = 1.0,
    tokens: int = 30,
    lr: float = 1e-2,
    batch: int = 16,
    epochs: int = 1,
    patience: int = 5,
    samples: int = 8,
    rows: int = 32,
    seed: int = 0,
    stream: Stream | None = None,
) -> Cone:
    """Train a direction, or the basis of a cone, by the three losses of RDO; defaults are the published ones.

    Targets are the model's own greedy answers, at most ``tokens`` tokens, made once: to harmful instructions with
    ``direction`` ablated; to harmless ones with it added at ``layer`` in its own length; to harmless ones as the model
    is. (The published code cuts the second at its first full stop, and the first direction may have been another than
    the one that is trained.) Losses, each a mean over prompts and over directions: cross-entropy of the first under
    ablation, and of the second under addition; KL(ablated || own) of the next token, summed over the third. In a cone
    the basis and ``samples`` drawn directions count alike. Of each step's gradient the part along the direction itself
    is left out; after it the basis is orthonormal again. A loss that does not fall for ``patience`` steps takes the
    rate to a tenth, the third time it ends the run. What is returned is the basis at which the least weighted loss was
    measured (the published code takes that of the sum without weights, and one step later).

    Cost: a step has three forwards and backwards through activations of ``batch`` x (K + samples) rows (K alone with
    K = 1), and one forward of ``batch`` rows. Weights get no gradient.

    Args:
        model: any Hugging Face causal language model with ``generate``, found by structure; not sharded.
        direction: [D], a difference of means in its own length, such as `select` gives with its layer.
        harmful, harmless: batches of instructions, as `estimate` takes them. Of the longer class a part is unused.
        layer: where it is added.
        dimension: K, of the cone.
        start: [D] or [n, D], n <= K: where training starts; otherwise at ``direction``. What is missing to K is drawn
            at random and made orthogonal.
        ablation, addition, retain: weights of the losses; one of 0 is not computed.
        rows: of the batches in one forward, which bounds the memory.
        stream: of the model, where there is one already.

    Raises:
        ValueError: tensors, prompts or numbers that do not fit, a sharded model, one that cannot generate.
        FloatingPointError: a loss that is not finite.
    """
    numbers = {"dimension": dimension, "tokens": tokens, "batch": batch, "epochs": epochs, "patience": patience}
    for name, value in (numbers | {"samples": samples, "rows": rows}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer, at least 1, got {value!r}")
    weights = {"ablation": float(ablation), "addition": float(addition), "retain": float(retain)}
    if min(weights.values()) < 0 or not 0 < sum(weights.values()) < float("inf"):
        raise ValueError(f"ablation, addition, retain: expected weights >= 0, not all of them 0, got {weights}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr: expected a number above 0, got {lr}")
    if sharded(model):
        raise ValueError("model: expected one that is not sharded: the directions would have to be, too")
    own = Stream(model) if stream is None else stream
    try:
        with _frozen(model, own):
            job = _Refining(own, direction, layer, weights, tokens, rows)
            pairs = job.targets(_prompts(harmful, "harmful"), _prompts(harmless, "harmless"))
            basis = job.begin(dimension, direction if start is None else start, seed)
            return job.train(basis, pairs, lr, batch, epochs, patience, samples, seed)
    finally:
        if stream is None:
            own.close()


@dataclass(frozen=True)
class _Sample:
    """A prompt of each class with its targets: (tokens, how many of them at the end are the target)."""

    ablation: tuple[list[int], int]
    addition: tuple[list[int], int]
    retain: tuple[list[int], int]


class _Refining:
    """The losses of directions, and their training."""

    def __init__(
        self, stream: Stream, direction: Tensor, layer: int, weights: dict[str, float], tokens: int, rows: int
    ) -> None:
        stream._check("direction", direction, (1,))
        if not direction.any():
            raise ValueError("direction: expected one that is not zero")
        if not 0 <= layer < len(stream.writes):
            raise ValueError(f"layer: expected 0 to {len(stream.writes) - 1}, got {layer}")
        self.stream, self.layer, self.weights, self.tokens, self.rows = stream, layer, weights, tokens, rows
        self.model = stream.structure.model
        embedding = stream.structure.head.weight
        self.device: torch.device = next(self.model.parameters()).device
        self.dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        self.direction = direction.detach().to(self.device, self.dtype)
        self.length = float(self.direction.norm())

    def begin(self, dimension: int, start: Tensor, seed: int) -> Tensor:
        """The first basis [K, D]."""
        self.stream._check("start", start, (1, 2))
        given = start.detach().to(self.device, self.dtype).reshape(-1, self.stream.width)
        if len(given) > dimension:
            raise ValueError(f"start: expected at most dimension = {dimension} directions, got {len(given)}")
        g = torch.Generator().manual_seed(seed)
        drawn = torch.randn(dimension - len(given), self.stream.width, generator=g, dtype=self.dtype)
        return orthonormalise(torch.cat([given, drawn.to(self.device)]))

    def targets(self, harmful: list[list[int]], harmless: list[list[int]]) -> list[_Sample]:
        """Pairs of prompts with what the model itself says to them."""
        count = min(len(harmful), len(harmless))
        harmful, harmless = harmful[:count], harmless[:count]
        with self.stream.ablated(self.direction):
            answered = self._answers(harmful)
        with self.stream.added(self.direction, self.layer):
            refused = self._answers(harmless)
        own = self._answers(harmless)
        return [_Sample(a, b, c) for a, b, c in zip(answered, refused, own, strict=True)]

    def _answers(self, prompts: list[list[int]]) -> list[tuple[list[int], int]]:
        generate = getattr(self.model, "generate", None)
        config = getattr(self.model, "generation_config", None)
        if generate is None or config is None:
            raise ValueError(f"model: expected one with generate(), got {type(self.model).__name__}")
        ends = config.eos_token_id
        ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        found: list[tuple[list[int], int]] = []
        for some in (prompts[i : i + self.rows] for i in range(0, len(prompts), self.rows)):
            ids, mask = self._padded(some)
            made = generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.tokens, do_sample=False, num_beams=1,
                pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
            )[:, ids.shape[1] :].tolist()  # fmt: skip
            for prompt, answer in zip(some, made, strict=True):
                end = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
                found.append(([*prompt, *answer[:end]], end))
        return found

    def _padded(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the left: answers end together."""
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, -len(text) :] = torch.tensor(text)
            mask[row, -len(text) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def train(
        self, basis: Tensor, pairs: list[_Sample], lr: float, batch: int, epochs: int, patience: int, samples: int,
        seed: int,
    ) -> Cone:  # fmt: skip
        """Steps until there are no more prompts, or the loss falls no more."""
        theta = basis.clone().requires_grad_()
        optimizer = torch.optim.AdamW([theta], lr=lr, betas=BETAS, weight_decay=0.0, amsgrad=True)
        g = torch.Generator().manual_seed(seed)
        losses: list[Tensor] = []
        best, least, at, waited, reduced = basis, float("inf"), 0, 0, 0
        for some in _batches(len(pairs), batch, epochs, g):
            drawn = _weights(samples, len(basis), g, basis) if len(basis) > 1 else None
            parts = self._gradient(theta, drawn, [pairs[i] for i in some])
            loss = float(parts[0])
            if not torch.isfinite(parts).all():
                raise FloatingPointError(f"directions: the loss of step {len(losses)} is not finite: {parts.tolist()}")
            if loss < least:
                best, least, waited, at = theta.detach().clone(), loss, 0, len(losses)
            else:
                waited += 1
            losses.append(parts)
            if waited >= patience:
                if reduced == REDUCTIONS:
                    break
                reduced, waited = reduced + 1, 0
                optimizer.param_groups[0]["lr"] /= 10
            torch.nn.utils.clip_grad_norm_([theta], CLIP)
            optimizer.step()
            with torch.no_grad():
                theta.copy_(orthonormalise(theta))
        return Cone(orthonormalise(best), torch.stack(losses), at)

    def _gradient(self, theta: Tensor, drawn: Tensor | None, pairs: list[_Sample]) -> Tensor:
        """Leave the gradient in ``theta``; the loss and its three parts [4]."""
        directions = theta / theta.norm(dim=-1, keepdim=True)
        shares = theta.new_full((len(theta),), 1 / len(theta))
        if drawn is not None:
            directions = torch.cat([directions, _combined(theta, drawn)])
            shares = torch.cat([shares, shares.new_full((len(drawn),), 1 / len(drawn))])
        leaf = directions.detach().requires_grad_()
        sums = torch.zeros(4, dtype=torch.float64)
        for part, name in enumerate(PARTS, start=1):
            if not self.weights[name]:
                continue
            texts = [getattr(pair, name) for pair in pairs]
            for rows in (range(i, min(i + self.rows, len(texts))) for i in range(0, len(texts), self.rows)):
                some = [texts[i] for i in rows]
                own = self._logits(some) if name == "retain" else None
                each = max(1, self.rows // len(some))
                for first in range(0, len(leaf), each):
                    mine = leaf[first : first + each]
                    loss = self._loss(name, mine, some, own) @ shares[first : first + each] / len(texts)
                    (self.weights[name] * loss).backward()
                    sums[part] += float(loss.detach())
        sums[0] = sum(self.weights[name] * sums[part] for part, name in enumerate(PARTS, start=1))
        (gradient,) = torch.autograd.grad(directions, theta, leaf.grad)
        along = (gradient * theta.detach()).sum(-1, keepdim=True) * theta.detach()
        theta.grad = gradient - along
        return sums

    def _loss(self, name: str, directions: Tensor, texts: list[tuple[list[int], int]], own: Tensor | None) -> Tensor:
        """Of each direction [G], summed over the texts."""
        count, each = len(directions), len(texts)
        index = torch.arange(count, device=self.device).repeat_interleave(each)
        scope: _Changing
        if name == "addition":
            scope = _Adding(directions, self.layer, self.length, index)
        else:
            basis = _Basis(directions[:, None])  # which is trained
            everywhere = dict.fromkeys(range(len(self.stream.writes)), basis)
            scope = Ablation(everywhere, index=index, shared=True, fuse=False)
        with self.stream._on(scope):
            logits = self._logits(texts * count)
        ids, counted = self._labels(texts)
        logits = logits.unflatten(0, (count, each)).log_softmax(-1)
        if own is None:
            nll = -logits.gather(-1, ids.expand(count, -1, -1)[..., None])[..., 0]
            return (torch.where(counted, nll, 0.0).sum(-1) / counted.sum(-1)).sum(-1)
        divergence = (logits.exp() * (logits - own.log_softmax(-1))).sum(-1)
        return torch.where(counted, divergence, 0.0).sum((-2, -1))

    def _labels(self, texts: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """The targets [B, T] at the end of each row, and where they are."""
        longest = max(count for _, count in texts)
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, (text, count) in enumerate(texts):
            ids[row, -count:] = torch.tensor(text[-count:])
        counted = torch.arange(longest) >= longest - torch.tensor([[count] for _, count in texts])
        return ids.to(self.device), counted.to(self.device)

    def _logits(self, texts: list[tuple[list[int], int]]) -> Tensor:
        """In front of each token of the targets, [B, T, V] in fp32 (float64); without gradients outside of scopes."""
        ids, mask = self._padded([text for text, _ in texts])
        longest = max(count for _, count in texts)
        options: dict[str, object] = {}
        if "logits_to_keep" in self.stream.structure.arguments:
            options["logits_to_keep"] = longest + 1
        if "use_cache" in self.stream.structure.arguments:
            options["use_cache"] = False
        if "position_ids" in self.stream.structure.arguments:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        out = self.model(input_ids=ids, attention_mask=mask, **options)
        logits: Tensor = out.logits[:, -longest - 1 : -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _weights(count: int, dimension: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Uniform on the positive part of the sphere, [count, K]."""
    drawn = torch.randn(count, dimension, generator=generator, dtype=torch.float64).abs()
    return (drawn / drawn.norm(dim=-1, keepdim=True)).to(like)


def _combined(basis: Tensor, weights: Tensor) -> Tensor:
    mixed = weights @ basis
    return mixed / mixed.norm(dim=-1, keepdim=True)


def _batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Each epoch in a new order; what does not fill a batch is left out, unless it is all there is."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for first in range(0, max(count - size, 0) + 1, size):
            yield order[first : first + size]


def _prompts(batches: Iterable[Batch], name: str) -> list[list[int]]:
    """The tokens of each prompt."""
    found = []
    for batch in batches:
        rows_at(batch, (-1,), name)
        mask = batch.get("attention_mask")
        for row, ids in enumerate(batch["input_ids"]):
            found.append((ids if mask is None else ids[mask[row] != 0]).tolist())
    if not found:
        raise ValueError(f"{name}: expected at least one prompt, got none")
    return found


@contextlib.contextmanager
def _frozen(model: nn.Module, stream: Stream) -> Iterator[None]:
    """In evaluation mode, weights without gradients, uncompiled; put back on leaving."""
    modes = [(module, module.training) for module in stream.structure.model.modules()]
    trained = [p for p in stream.structure.model.parameters() if p.requires_grad]
    eager = torch.compiler.set_stance("force_eager") if compiled(model) else contextlib.nullcontext()
    try:
        stream.structure.model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with eager, torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode

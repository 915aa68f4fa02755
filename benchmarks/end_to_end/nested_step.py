"""One step of each nested defense on SmolLM2 with real text: the workload, its contenders, what is not a model pass.

    python benchmarks/end_to_end/nested_step.py tar fastguard published passes

prints a JSON line per contender with the peak memory above the model, each measured in a process of its own;
``bench_nested_steps.py`` times them. Contenders:

passes              the model passes that the method's mathematics needs, and nothing else: Hugging Face's own forward,
                    logits and loss, and a backward into fresh gradients
passes, fused head  the same through ``LanguageModelLoss``, which makes no [B, T, V] logits: what the nested engine
                    adds is its time above these
fastguard           the defense
published           the published algorithm, written eagerly (tests/defenses)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import measure  # noqa: E402
from end_to_end.step import load, prose  # noqa: E402

METHODS = ("tar", "booster", "vaccine")
CONTENDERS = ("passes", "passes, fused head", "fastguard", "published")
INNER, EVERY = 8, 4
"""TAR's inner steps here and how often the gradient is read; published: 64 and 4, of which every part but the retain
pass, the reference and the snapshot is a multiple."""
LR = 2e-5
TOKENS = {"tar": 512, "booster": 512, "vaccine": 512}
"""Of the largest batch of a step."""

Batch = dict[str, Tensor]
Step = Callable[[], float]


def batches(tokenizer: Any, count: int, samples: int, tokens: int) -> list[Batch]:
    """Different passages of Wikipedia, every token of which carries loss."""
    ids = prose(tokenizer, count * samples, tokens).split(samples)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


@dataclass
class Work:
    """The batches of a step, by the names that the method gives them."""

    attack: list[Batch]
    tamper: Batch
    retain: Batch
    harmful: Batch
    harmless: Batch

    @staticmethod
    def of(method: str, tokenizer: Any) -> Work:
        """TAR: 4 x 64 tokens for attackers and tamper loss, 8 x 64 to retain; the others 4 x 128."""
        if method == "tar":
            *attack, tamper = batches(tokenizer, INNER + 1, 4, 64)
            retain = batches(tokenizer, 10, 8, 64)[-1]
            return Work(attack, tamper, retain, tamper, retain)
        harmful, harmless = batches(tokenizer, 2, 4, 128)
        return Work([], harmful, harmless, harmful, harmless)

    def largest(self) -> Batch:
        """The batch whose activations are the largest."""
        return max((self.retain, self.tamper), key=lambda b: b["input_ids"].numel())


def flops(method: str, parameters: int = 134_515_008, body: int = 106_203_456) -> float:
    """Of the model passes, attention's own products left out: 2 a token and weight, forward and for each gradient."""
    passes = {
        "tar": 6 * parameters * (INNER + INNER // EVERY) * 256 + (2 * body + 6 * parameters) * 512,
        "booster": 3 * 6 * parameters * 512,
        "vaccine": (4 + 6) * parameters * 512,
    }
    return float(passes[method])


# The model passes


class Passes:
    """Forwards and backwards of the model, each backward into fresh gradients."""

    def __init__(self, model: Any, loss: Callable[[Batch, str], Tensor]) -> None:
        self.model, self.loss = model, loss

    def full(self, batch: Batch, kind: str = "cross_entropy") -> float:
        """A forward and a backward."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(batch, kind)
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def states(self, batch: Batch) -> None:
        """A forward without gradients, as far as the last hidden state."""
        self.model(**{k: v for k, v in batch.items() if k != "labels"}, logits_to_keep=1)

    def activations(self, batch: Batch) -> float:
        """A forward and a backward for activations alone, which ends at the first attention block's output."""
        lowest: list[Tensor] = []

        def leaf(module: nn.Module, args: Any, output: Any) -> Any:
            lowest.append(output[0].detach().requires_grad_())
            return (lowest[0], *output[1:])

        handle = self.model.model.layers[0].self_attn.register_forward_hook(leaf)
        self.model.requires_grad_(False)
        try:
            loss = self.loss(batch, "cross_entropy")
            torch.autograd.grad(loss, lowest[0])
        finally:
            self.model.requires_grad_(True)
            handle.remove()
        return float(loss.detach())

    def of(self, method: str, work: Work) -> float:
        """All passes of one step; the last loss."""
        if method == "tar":
            for i, batch in enumerate(work.attack):
                self.full(batch)
                if (i + 1) % EVERY == 0:
                    self.full(work.tamper, "max_entropy")
            self.states(work.retain)
            return self.full(work.retain)
        if method == "booster":
            self.full(work.harmful)
            self.full(work.harmful)
            return self.full(work.harmless)
        self.activations(work.harmless)
        return self.full(work.harmless)


def passes(model: Any, fused: bool) -> Passes:
    """The passes with Hugging Face's own cross-entropy everywhere, or with `LanguageModelLoss`."""
    if not fused:
        return Passes(model, lambda batch, kind: model(**batch).loss)
    from fastguard.losses.language_model import LanguageModelLoss

    language = LanguageModelLoss(model)
    return Passes(model, lambda batch, kind: language(batch, kind))


# The contenders


def step(method: str, name: str, model: Any, work: Work) -> Step:
    """A function that runs one step of a contender and returns a loss; defenses leave their gradients."""
    if name.startswith("passes"):
        run = passes(model, name != "passes")
        return lambda: run.of(method, work)
    if name not in CONTENDERS:
        raise ValueError(f"contender: expected one of {', '.join(CONTENDERS)}, got {name!r}")
    once = (_fastguard if name == "fastguard" else _published)(method, model, work)

    def cleared() -> float:
        model.zero_grad(set_to_none=True)
        return once()

    return cleared


def _fastguard(method: str, model: Any, work: Work) -> Step:
    if method == "tar":
        from fastguard.defenses.tar.step import TAR, Adversary

        tar = TAR(model, steps=INNER, every=EVERY)

        def outer() -> float:
            adversary = Adversary("harmful", LR, work.attack)
            return float(tar.backward(retain=work.retain, tamper=work.tamper, adversaries=[adversary])["loss"])

        return outer
    if method == "booster":
        from fastguard.defenses.booster.step import Booster

        booster = Booster(model)
        return lambda: float(booster.backward(harmful=work.harmful, harmless=work.harmless)["loss"])
    from fastguard.defenses.vaccine.step import Vaccine

    vaccine = Vaccine(model)
    return lambda: float(vaccine.backward(harmless=work.harmless)["loss"])


def _published(method: str, model: Any, work: Work) -> Step:
    if method == "tar":
        from defenses.published_tar import outer_step

        frozen = copy.deepcopy(model).requires_grad_(False)
        return lambda: outer_step(
            model, frozen, work.retain, [work.tamper], [(LR, work.attack)], steps=INNER, every=EVERY
        )["retain"]
    if method == "booster":
        from defenses.published_booster import published_booster

        return lambda: _no_loss(published_booster(model, work.harmful, work.harmless))
    from defenses.published_vaccine import published_vaccine

    return lambda: _no_loss(published_vaccine(model, work.harmless))


def _no_loss(nothing: None) -> float:
    """Where a contender does not say what its loss was."""
    return math.nan


# What is not a model pass


class Parts:
    """Seconds and bytes of everything in a step that is not a model pass, by its name.

    Functions of the package are wrapped for the length of a ``with``; each is charged its own time, without that of
    wrapped functions that it calls. Bytes are what the arithmetic has to read and write, of parameter-sized tensors.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self._inner = [0.0]
        self._undo: list[Callable[[], None]] = []

    def rows(self) -> list[dict[str, Any]]:
        """One a part, the longest first."""
        order = sorted(self.seconds, key=lambda part: -self.seconds[part])
        return [{"part": p, "seconds": self.seconds[p], "bytes": self.bytes[p]} for p in order if p]

    @contextlib.contextmanager
    def span(self, part: str, size: int = 0) -> Iterator[None]:
        """Charge what runs inside to ``part`` ("": to nobody)."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[part] += whole - self._inner.pop()
            self.bytes[part] += size
            self._inner[-1] += whole

    def __enter__(self) -> Parts:
        import fastguard.ops.multi_tensor  # noqa: F401
        from fastguard import ops
        from fastguard.losses import language_model
        from fastguard.nested import activations, attack, guard, optimizers, reference, snapshot, weights
        from fastguard.taps import taps

        op = ops.multi_tensor
        for function, part, times in (
            (op.squared_norm, "norms", 1), (op.dot, "norms", 2), (op.accumulate_, "accumulate", 3),
            (op.perturb_, "perturb", 3), (op.adamw_, "inner AdamW", 7),
        ):  # fmt: skip
            self._everywhere(function, part, lambda a, times=times: times * _size(a[0]))
        self._method(optimizers._AdamW, "step", "inner AdamW, its moments made", None)
        self._method(snapshot.Snapshot, "take", "snapshot", lambda a: 2 * a[0].bytes)
        self._method(snapshot.Snapshot, "restore_", "restore", lambda a: 2 * a[0].bytes)
        self._context(reference.Reference, "installed", "reference exchange", lambda a: 4 * a[0].bytes)
        self._everywhere(guard.own_random_numbers, "random numbers", None, context=True)
        for name in ("__init__", "prepare", "local", "take_gradients", "put_gradients", "refuse_waiting_gradients"):
            self._method(weights.Weights, name, "parameter lists", None)
        self._method(attack.Tampered, "check", "finite losses", None)
        for site in (taps.Site, taps.InputSite):
            self._method(site, "__call__", "hooks", None)
        self._method(language_model.OutputScope, "observe", "", None)  # the head, and so part of the model pass
        self._method(language_model._Distance, "__call__", "representation distance (forward)", None)
        self._method(activations._Shift, "observe", "activation perturbation", lambda a: 3 * _size([a[3]]))
        return self

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _wrapped(self, function: Any, part: str, size: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            with self.span(part, size(args) if size else 0):
                return function(*args, **options)

        return timed

    def _method(self, owner: Any, name: str, part: str, size: Any) -> None:
        self._put(owner, name, self._wrapped(owner.__dict__[name], part, size))

    def _context(self, owner: Any, name: str, part: str, size: Any) -> None:
        factory = getattr(owner, name)
        self._put(owner, name, lambda *a, **o: _TimedContext(factory(*a, **o), self, part, size(a) if size else 0))

    def _everywhere(self, function: Any, part: str, size: Any, context: bool = False) -> None:
        """Wrap a function under every name that a module of the package has for it."""
        for module in [m for name, m in list(sys.modules.items()) if name.startswith("fastguard.")]:
            for name in [n for n, value in vars(module).items() if value is function]:
                if context:
                    self._context(module, name, part, size)
                else:
                    self._put(module, name, self._wrapped(function, part, size))

    def _put(self, owner: Any, name: str, value: Any) -> None:
        before = owner.__dict__[name]
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))


class _TimedContext:
    """A context manager whose entry and exit are charged to a part, each moving ``size`` bytes."""

    def __init__(self, inner: Any, parts: Parts, part: str, size: int) -> None:
        self.inner, self.parts, self.part, self.size = inner, parts, part, size

    def __enter__(self) -> Any:
        with self.parts.span(self.part, self.size):
            return self.inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        with self.parts.span(self.part, self.size):
            return self.inner.__exit__(*error)


def row(contender: str, seconds: list[float], ratio: float, peak: int | None = None) -> dict[str, Any]:
    """A contender's line of the table, as ``run.py`` reads it."""
    stats = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds), "rounds": len(seconds)}
    found = {"contender": contender, "seconds": stats, "ratio_to_plain": ratio}
    return found if peak is None else {**found, "peak_bytes": peak}


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# Memory


def parameter_bytes(model: nn.Module) -> int:
    """Of all trainable parameters, and so of one gradient, one snapshot, one moment, one accumulator in fp32."""
    return _size([p for p in model.parameters() if p.requires_grad])


HELD = {
    "tar": {"gradients": 1, "accumulator": 1, "outer AdamW": 2, "inner AdamW": 2, "snapshot": 1},
    "booster": {"gradients": 1, "accumulator": 1, "outer AdamW": 2, "snapshot": 1},
    "vaccine": {"gradients": 1, "outer AdamW": 2},
}
"""What a step may hold above the model and the activations of a pass, in multiples of the parameters."""


def bound(method: str, parameters: int, activations: int) -> int:
    """The aim for the peak above the model: what must be held, plus 10% of that and of the model."""
    needed = parameters * (1 + sum(HELD[method].values())) + activations
    return int(1.1 * needed) - parameters


def peak_of(method: str, name: str) -> dict[str, Any]:
    """Peak memory above the model of a step with its optimizer's, and of all that it holds for that.

    TAR reads twice in four inner steps here: what is held is the same as in 64.
    """
    model, tokenizer = load()
    work = Work.of(method, tokenizer)
    tiny = {k: v[:1, :8] for k, v in work.retain.items()}
    passes(model, False).full(tiny)  # what a process allocates once
    model.zero_grad(set_to_none=True)
    if name == "passes":
        one = passes(model, False)
        peak = measure.peak_bytes(lambda: one.full(work.largest()))
        return {"contender": name, "peak_bytes": peak, "parameter_bytes": parameter_bytes(model)}

    def whole() -> None:
        outer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        outer.step()  # its states are there from the second step of a training on
        once = step(method, name, model, work)
        once()
        outer.step()

    return {"contender": name, "peak_bytes": measure.peak_bytes(whole), "parameter_bytes": parameter_bytes(model)}


def peak_in_fresh_process(method: str, name: str) -> dict[str, Any]:
    """`peak_of` in a process of its own, which gives freed memory back to the system at once: what is live counts."""
    command = [sys.executable, __file__, method, name, "--here"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(out.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    global INNER, EVERY
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--here", action="store_true", help="in this process (one contender)")
    options = parser.parse_args()
    INNER, EVERY = 4, 2
    for name in options.contenders:
        print(json.dumps((peak_of if options.here else peak_in_fresh_process)(options.method, name)))


if __name__ == "__main__":
    main()

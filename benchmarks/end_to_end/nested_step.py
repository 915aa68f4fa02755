"""One step of a defense on SmolLM2 with real text: the workload, its contenders, what is not a model pass.

    python benchmarks/end_to_end/nested_step.py tar fastguard published passes --set inner_steps=4

prints a JSON line per contender with the peak memory above the model, each measured in a process of its own;
``bench_nested_steps.py`` times them. The registry says which defenses there are, their roles which batches a step
wants, and their costs on paper which passes of the model it is made of and what it holds. Contenders:

passes              the model passes of the cost, and nothing else: Hugging Face's own forward, logits and loss, and a
                    backward into fresh gradients. All tokens carry loss; a pass without a head ends at the last hidden
                    state
passes, fused head  the same through ``LanguageModelLoss``, which makes no [B, T, V] logits: what the defense adds is
                    its time above these
fastguard           the defense
published           the published algorithm, written eagerly: ``contender`` of tests/defenses/published_NAME.py, a
                    function of (model, options, the batches of a step by name) that returns the step
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import measure  # noqa: E402
from end_to_end.step import load, prose  # noqa: E402
from fastguard import methods  # noqa: E402
from fastguard.plan.architecture import MODELS, Architecture, from_config  # noqa: E402
from fastguard.plan.command import assignments  # noqa: E402
from fastguard.plan.cost import Recipe  # noqa: E402
from fastguard.plan.parts import Pass, held, moments  # noqa: E402
from fastguard.plan.setting import PRECISIONS, Setting  # noqa: E402
from fastguard.settings import Settings, build  # noqa: E402

CONTENDERS = ("passes", "passes, fused head", "fastguard", "published")
SAMPLES, TOKENS = 8, 64
LR = 2e-5
POOL = 96
"""Passages of which batches are made; a step's batches have few of them in common."""

Batch = dict[str, Tensor]
Step = Callable[[], float]


@dataclass(frozen=True)
class Job:
    """A step that is measured: the defense, its options (those ``given`` by name), and the run's samples and tokens."""

    entry: methods.Entry
    options: Settings
    given: frozenset[str]
    samples: int = SAMPLES
    tokens: int = TOKENS

    @staticmethod
    def of(name: str, changes: Mapping[str, Any] | None = None, samples: int = SAMPLES, tokens: int = TOKENS) -> Job:
        """With what the defense says that its steps are timed with, ``changes`` on top. Raises ValueError."""
        entry = methods.find(name, "defense")
        kind = entry.load_options()
        values = {**kind.timed, **(changes or {})}
        return Job(entry, build(kind, values), frozenset(values), samples, tokens)

    def recipe(self, architecture: Architecture) -> Recipe:
        """The parts and items of the step on one device in fp32. Raises ValueError where it cannot be planned."""
        setting = self.setting(architecture)
        return self.entry.load_cost().here(setting, self.options)

    def setting(self, architecture: Architecture) -> Setting:
        """The job as the planner takes it."""
        return Setting(
            architecture, gpus=1, global_batch=self.samples, tokens=self.tokens, precision=PRECISIONS["fp32"],
            checkpointing=False, cpu=True, given=self.given,
        )  # fmt: skip

    @property
    def title(self) -> str:
        """For the head of a table."""
        changes = self.options.describe()
        return f"{self.entry.title} step{f' ({changes})' if changes else ''}"


def default() -> list[str]:
    """The defenses that are benchmarked unless others are named: those whose step has more than one model pass."""
    found = []
    for name, entry in methods.defenses().items():
        if entry.cost is None:
            continue
        planned = runs(Job.of(name).recipe(MODELS["smollm2-135m"]))
        if sum(run.count for run in planned) > 1:
            found.append(name)
    return found


def architecture_of(model: Any) -> Architecture:
    """Of a Hugging Face model."""
    return from_config(model.config.to_dict(), type(model).__name__)


# The batches


class Streams:
    """Batches by role and number out of a pool of passages [n, T].

    Every token carries loss, of pairs those of the second half.
    """

    def __init__(self, pool: Tensor, samples: int) -> None:
        self.pool, self.samples = pool, samples

    def batch(self, number: int, samples: int | None = None) -> Batch:
        """A plain batch."""
        count = samples or self.samples
        ids = self.pool[torch.arange(number * count, (number + 1) * count) % len(self.pool)]
        labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], 1)  # the first is predicted by nothing
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def pair(self, number: int, samples: int | None = None) -> tuple[Batch, Batch]:
        """The same first halves, and other second halves."""
        one, other = self.batch(2 * number, samples), self.batch(2 * number + 1, samples)
        half = self.pool.shape[1] // 2
        other["input_ids"][:, :half] = one["input_ids"][:, :half]
        for batch in (one, other):
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, :half] = -100
        return one, other

    def of(self, roles: Mapping[str, Any]) -> dict[str, Callable[[int], Any]]:
        """A stream for each role of a method; each begins elsewhere in the pool."""
        return {name: self._stream(role, 7 * i) for i, (name, role) in enumerate(roles.items())}

    def _stream(self, role: Any, shift: int) -> Callable[[int], Any]:
        names = {"pair": ("harmful", "harmless"), "preference": ("rejected", "chosen")}.get(role.data)
        if names is not None:
            return lambda n: dict(zip(names, self.pair(n + shift, role.count), strict=True))
        return lambda n: self.batch(n + shift, role.count)


def streams(job: Job, tokenizer: Any) -> Streams:
    """Of Wikipedia passages."""
    return Streams(prose(tokenizer, POOL, job.tokens), job.samples)


# The model passes


@dataclass(frozen=True)
class Run:
    """A pass that a step makes ``count`` times: a forward, with ``head`` or without, and so many backwards of it."""

    of: Pass
    count: int
    head: bool
    backwards: int


def runs(recipe: Recipe) -> list[Run]:
    """The model passes of a recipe, in its order; one of which less than half a step is made is left out.

    A backward without a forward of its own is another backward of the next pass.
    """
    heads = {part.name.partition(": ")[0] for part in recipe.parts if part.kind == "head"}
    found: dict[str, Run] = {}
    waiting = 0
    for part in recipe.parts:
        if part.of is None:
            continue
        name = part.of.name
        if part.name == f"{name}: forward":
            found[name] = Run(part.of, round(part.count), name in heads, waiting)
            waiting = 0
        elif name in found:
            found[name] = dataclasses.replace(found[name], backwards=found[name].backwards + 1)
        else:
            waiting += 1
    if waiting:
        raise ValueError(f"recipe: {waiting} backwards come after the last forward")
    return [run for run in found.values() if run.count]


def flops(recipe: Recipe, architecture: Architecture, tokens: int) -> float:
    """Of the passes as Hugging Face computes them: the layers' by the recipe, and a head with full logits."""
    products = {"none": 0, "activations": 1, "weights": 2}
    heads = sum(
        run.count * 2.0 * run.of.samples * tokens * architecture.head * (1 + products[run.of.gradients] * run.backwards)
        for run in runs(recipe) if run.head
    )  # fmt: skip
    return heads + sum(part.flops for part in recipe.parts if part.of is not None and round(part.count))


class Passes:
    """Forwards and backwards of the model, each backward into fresh gradients, by Hugging Face's loss or by ours."""

    def __init__(self, model: Any, streams: Streams, fused: bool = False) -> None:
        from fastguard.taps import find_structure

        self.model, self.streams = model, streams
        self.attentions = find_structure(model).attentions
        self.loss: Callable[[Batch], Tensor] = lambda batch: model(**batch).loss
        if fused:
            from fastguard.losses.language_model import LanguageModelLoss

            language = LanguageModelLoss(model)
            self.loss = lambda batch: language(batch)

    def all(self, planned: Sequence[Run]) -> float:
        """All passes of one step; the last loss."""
        value, number = math.nan, 0
        for run in planned:
            for _ in range(run.count):
                value = self.one(run, self.streams.batch(number, run.of.samples))
                number += 1
        return value

    def one(self, run: Run, batch: Batch) -> float:
        """One pass; its loss."""
        if run.of.gradients == "none":
            with torch.no_grad():
                return float(self._forward(run, batch))
        if run.of.gradients == "activations":
            return self._activations(run, batch)
        loss = self._forward(run, batch)
        for left in reversed(range(run.backwards)):
            self.model.zero_grad(set_to_none=True)
            loss.backward(retain_graph=left > 0)
        return float(loss.detach())

    def _forward(self, run: Run, batch: Batch) -> Tensor:
        if run.head:
            return self.loss(batch)
        states = self.model.base_model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
        return states.square().mean()

    def _activations(self, run: Run, batch: Batch) -> float:
        """A forward and a backward for activations alone, which ends at an attention block's output."""
        lowest: list[Tensor] = []

        def leaf(module: nn.Module, args: Any, output: Any) -> Any:
            lowest.append(output[0].detach().requires_grad_())
            return (lowest[0], *output[1:])

        handle = self.attentions[round(run.of.stop or 0)].register_forward_hook(leaf)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad = False
        try:
            loss = self._forward(run, batch)
            torch.autograd.grad(loss, lowest[0])
        finally:
            for p in trained:
                p.requires_grad = True
            handle.remove()
        return float(loss.detach())


# The contenders


def step(job: Job, name: str, model: Any, streams: Streams) -> Step:
    """A function that runs one step of a contender and returns its loss, NaN where it has none to tell.

    Defenses leave their gradients. ``fastguard``: the first call is step 0, every later one is step 1 again.
    Raises ValueError for a name that is not known, LookupError where there is no such contender.
    """
    if name.startswith("passes") and name in CONTENDERS:
        passes, planned = Passes(model, streams, name != "passes"), runs(job.recipe(architecture_of(model)))
        return lambda: passes.all(planned)
    if name not in CONTENDERS:
        raise ValueError(f"contender: expected one of {', '.join(CONTENDERS)}, got {name!r}")
    once = (_fastguard if name == "fastguard" else _published)(job, model, streams)

    def cleared() -> float:
        model.zero_grad(set_to_none=True)
        return once()

    return cleared


def _fastguard(job: Job, model: Any, streams: Streams) -> Step:
    method = job.entry.build(model, job.options)
    data, after_first = streams.of(method.roles), None

    def once() -> float:
        nonlocal after_first
        if after_first is not None:
            method.load_state_dict(after_first)
        loss = float(method.backward(**method.draw(data))["loss"])
        after_first = after_first or method.state_dict()
        return loss

    return once


def _published(job: Job, model: Any, streams: Streams) -> Step:
    missing = no_published(job.entry.name)
    if missing:
        raise LookupError(missing)
    method = job.entry.build(model, job.options)
    method.step = 1
    batches = method.draw(streams.of(method.roles))
    method.close()
    del method
    gc.collect()  # it may hold as much as a model
    once = importlib.import_module(f"defenses.published_{job.entry.name}").contender(model, job.options, **batches)

    def run() -> float:
        loss = once()
        return math.nan if loss is None else float(loss)

    return run


def no_published(name: str) -> str:
    """Why there is no published contender; empty where there is one."""
    module = f"defenses.published_{name}"
    if importlib.util.find_spec(module) is None:
        return f"published: there is no tests/defenses/published_{name}.py"
    if not hasattr(importlib.import_module(module), "contender"):
        return f"published: tests/defenses/published_{name}.py has no contender()"
    return ""


def row(contender: str, seconds: list[float], ratio: float, peak: int | None = None) -> dict[str, Any]:
    """A contender's line of the table, as ``run.py`` reads it."""
    stats = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds), "rounds": len(seconds)}
    found = {"contender": contender, "seconds": stats, "ratio_to_plain": ratio}
    return found if peak is None else {**found, "peak_bytes": peak}


# Memory


def parameter_bytes(model: nn.Module) -> int:
    """Of all trainable parameters, and so of one gradient, one snapshot, one moment, one accumulator in fp32."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def bound(recipe: Recipe, parameters: int) -> int:
    """The aim for the peak above the model: what the cost holds at its worst moment, plus 10%, the model's included.

    On a CPU what waits on the host is in the same memory.
    """
    host = sum(i.bytes for i in recipe.items if i.host and i.moments is None)
    beside = [dataclasses.replace(i, host=False) for i in recipe.items if not (i.host and i.moments is None)]
    most = max(sum(i.bytes for i in held(beside, moment)) for moment in moments(beside))
    return int(1.1 * (host + most)) - parameters


def largest_pass(planned: Sequence[Run]) -> Run:
    """The one that holds the most."""
    return max(planned, key=lambda run: (run.of.gradients == "weights", run.head, run.of.samples))


def peak_of(job: Job, name: str) -> dict[str, Any]:
    """Peak memory above the model of a step with its optimizer's, and of all that it holds for that.

    ``passes``: of its largest pass alone.
    """
    model, tokenizer = load()
    texts = streams(job, tokenizer)
    warm = Run(Pass("warm", 1), 1, True, 1)
    Passes(model, texts).one(warm, {k: v[:, :8] for k, v in texts.batch(0, 1).items()})  # what is allocated once
    model.zero_grad(set_to_none=True)
    if name == "passes":
        one = Passes(model, texts)
        largest = largest_pass(runs(job.recipe(architecture_of(model))))
        peak = measure.peak_bytes(lambda: one.one(largest, texts.batch(0, largest.of.samples)))
        return {"contender": name, "peak_bytes": peak, "parameter_bytes": parameter_bytes(model)}

    def whole() -> None:
        outer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        outer.step()  # its states are there from the second step of a training on
        once = step(job, name, model, texts)
        once()
        outer.step()

    return {"contender": name, "peak_bytes": measure.peak_bytes(whole), "parameter_bytes": parameter_bytes(model)}


def peak_in_fresh_process(job: Job, name: str) -> dict[str, Any]:
    """`peak_of` in a process of its own, which gives freed memory back to the system at once: what is live counts."""
    command = [sys.executable, __file__, job.entry.name, name, "--here"]
    command += ["--samples", str(job.samples), "--tokens", str(job.tokens)]
    values = job.options.to_dict()
    command += [text for key in sorted(job.given) for text in ("--set", f"{key}={json.dumps(values[key])}")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "method", choices=[name for name, entry in methods.defenses().items() if entry.cost is not None]
    )
    parser.add_argument("contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--here", action="store_true", help="in this process (one contender)")
    options = parser.parse_args()
    job = Job.of(options.method, assignments(options.set), options.samples, options.tokens)
    for name in options.contenders:
        missing = no_published(options.method) if name == "published" else ""
        found = {"left_out": missing} if missing else (peak_of if options.here else peak_in_fresh_process)(job, name)
        print(json.dumps({"contender": name, **found}))


if __name__ == "__main__":
    main()

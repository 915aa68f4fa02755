"""What a training writes down as it goes: every step's figures, how fast it was, and what it took.

A row has the figures of the curve (loss, gradient norm, what the method adds) and ``step``, which goes on over the
parts of a stage, ``lr``, ``seconds`` and, of all ranks together, ``tokens_per_second`` of the batches drawn, without
padding, and ``peak_memory_bytes`` of the largest: the device's, on a CPU the process's. On GPUs that the planner knows
``model_flops_utilisation`` is the share of their bf16 peak that the model's own products had: for a token that passes
forward 2 N + 4 L Q T flops, for one that comes back three times as many (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B), of all passes that the method makes. Recomputation and padding do not count; a pass that a method cuts
short counts whole, and heads that read hidden states do not.

A run that goes on rewrites what it does again: rows from the step where it takes up are dropped first. The first
process alone writes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastguard.machine import peak_memory, ranks, write_atomically
from fastguard.methods.training import Stream
from fastguard.nested.guard import derived_seed
from fastguard.parallel import everyone, is_first
from fastguard.plan.architecture import Architecture, from_config
from fastguard.plan.hardware import GPUS
from fastguard.ranks import data_ranks

if TYPE_CHECKING:
    from fastguard.run.config import LoggingConfig
    from fastguard.run.train import Loop

Row = Mapping[str, float | str]


class Tracker(Protocol):
    """Something that keeps rows."""

    def write(self, step: int, row: Row) -> None:
        """Keep the row of a step, at once."""

    def close(self) -> None:
        """There are no more."""


def required(trackers: Iterable[str]) -> None:
    """Raise ImportError for trackers whose package is not there."""
    for name in trackers:
        if name != "jsonl" and importlib.util.find_spec(name) is None:
            raise ImportError(
                f"logging.trackers: {name} needs the package {name}: pip install 'fastguard-kernels[{name}]'"
            )


class Jsonl:
    """Rows as lines of JSON in a file; what a kill tore off, and steps from ``first`` on, go before the first one."""

    def __init__(self, file: Path, first: int, name: Mapping[str, str]) -> None:
        self.name = name
        if file.exists():
            lines = file.read_bytes().splitlines(keepends=True)
            write_atomically(file, b"".join(x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] < first))
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115, open as long as the training runs

    def write(self, step: int, row: Row) -> None:
        """See `Tracker.write`."""
        self._file.write(json.dumps({**self.name, "step": step, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See `Tracker.close`."""
        self._file.close()


class TensorBoard:
    """Rows as event files of a folder of their own."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first, flush_secs=10)  # type: ignore[no-untyped-call]

    def write(self, step: int, row: Row) -> None:
        """See `Tracker.write`."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()  # type: ignore[no-untyped-call]


class Wandb:
    """Rows of a run of Weights & Biases, which a run that goes on takes up; it drops steps that it has already."""

    def __init__(self, folder: Path, project: str, name: Mapping[str, str]) -> None:
        import wandb

        folder.parent.mkdir(parents=True, exist_ok=True)
        group = str(folder.parents[1].resolve())
        self._run = wandb.init(
            project=project, name=folder.name, group=group, id=f"{derived_seed(group, folder.name):x}", resume="allow",
            dir=str(folder.parent), config=dict(name),
        )  # fmt: skip

    def write(self, step: int, row: Row) -> None:
        """See `Tracker.write`."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


class Journal:
    """The rows of one training.

    Args:
        folder: ``logs/NAME`` of the run: a file NAME.jsonl and folders NAME are made there. part: who keeps rows.
        name: what each line of JSON says of the training. before: steps of the stage before this training's.
    """

    def __init__(self, folder: Path, part: LoggingConfig, name: Mapping[str, str], before: int = 0) -> None:
        self.folder, self.part, self.name, self.before = folder, part, name, before
        self._trackers: list[Tracker] = []

    def begin(self, loop: Loop) -> None:
        """The steps after those that ``loop`` has are to come."""
        first = self.before + len(loop.curve)
        made: dict[str, Callable[[], Tracker]] = {
            "jsonl": lambda: Jsonl(self.folder.with_name(self.folder.name + ".jsonl"), first, self.name),
            "tensorboard": lambda: TensorBoard(self.folder, first),
            "wandb": lambda: Wandb(self.folder, self.part.project, self.name),
        }
        self._trackers = [made[kind]() for kind in self.part.trackers] if is_first() else []
        self._seconds, self._meter = loop.seconds, Meter(loop.method.model)
        loop.data = {role: self._meter.counted(stream) for role, stream in loop.data.items()}

    def after_step(self, loop: Loop) -> None:
        """Write the last step's row; called by every process."""
        seconds, self._seconds = loop.seconds - self._seconds, loop.seconds
        row = {name: value for name, value in loop.curve[-1].items() if name != "step"}
        row |= {"lr": loop.optimizer.param_groups[0]["lr"], "seconds": seconds, **self._meter.read(seconds)}
        for tracker in self._trackers:
            tracker.write(self.before + len(loop.curve) - 1, row)

    def close(self) -> None:
        """There are no more steps."""
        self._meter.close()
        for tracker in self._trackers:
            tracker.close()


def bf16_peak(device: torch.device) -> float | None:
    """Flops a second of a GPU that the planner knows."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.flops for gpu in GPUS.values() if gpu.name.split("-")[0] in name), None)


def lengths(batch: Mapping[str, Any]) -> Tensor:
    """[B] tokens of each sample, without padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return (torch.ones_like(ids) if mask is None else mask).sum(-1).double()


class Meter:
    """Counts the tokens that are drawn and, where the device's peak is known, the flops of the model's passes."""

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        self._share = data_ranks(model).size / ranks()  # tensor-parallel peers draw and compute the same
        self._peak, self._architecture = bf16_peak(self._device), architecture(model)
        self._tokens: list[Tensor] = []
        self._flops: list[Tensor] = []
        known = self._peak is not None and self._architecture is not None
        self._hook = model.register_forward_pre_hook(self._passes, with_kwargs=True) if known else None

    def counted(self, stream: Stream) -> Stream:
        """The same stream, of which the tokens are counted."""

        def draw(number: int) -> Any:
            drawn = stream(number)
            self._count(drawn)
            return drawn

        return draw

    def _count(self, drawn: Any) -> None:
        if isinstance(drawn, Mapping) and "input_ids" in drawn:
            self._tokens.append(lengths(drawn).sum())
        elif isinstance(drawn, Mapping):  # several batches by name
            for batch in drawn.values():
                self._count(batch)

    def _passes(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        a = self._architecture
        assert a is not None
        each = lengths(kwargs if "input_ids" in kwargs else {**kwargs, "input_ids": args[0]})
        weights = a.layers * a.products + a.head
        flops = (2.0 * weights * each + 4.0 * a.layers * a.attention_width * each.square()).sum()
        self._flops.append(3 * flops if torch.is_grad_enabled() else flops)

    def read(self, seconds: float) -> dict[str, float]:
        """What was counted since the last time, of all processes, as figures of a step that took so long."""
        device = self._device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
        tokens, flops = (float(sum(found)) for found in (self._tokens, self._flops))
        self._tokens, self._flops = [], []
        every = everyone((tokens, flops, peak))
        figures = {"tokens_per_second": self._share * sum(t for t, _, _ in every) / seconds}
        if self._hook is not None and self._peak is not None:
            done = self._share * sum(f for _, f, _ in every)
            figures["model_flops_utilisation"] = done / seconds / (ranks() * self._peak)
        return {**figures, "peak_memory_bytes": float(max(p for _, _, p in every))}

    def close(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()


def architecture(model: nn.Module) -> Architecture | None:
    """The planner's view of a model; None of one that it does not know."""
    try:
        return from_config(model.config.get_text_config().to_dict())  # type: ignore[union-attr, operator]
    except (AttributeError, ValueError):
        return None

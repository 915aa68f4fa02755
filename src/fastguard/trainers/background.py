"""Checkpoints that are written while training goes on.

Training waits for a copy of its tensors to host memory, as large as the checkpoint; a thread writes it, as ``save``
does, in collectives of a gloo group of its own. One save at a time: the next one waits for it.

torch.distributed.checkpoint's own ``async_save`` is not used: its stager fails on the shards of a run that trains one
model after another (torch 2.13: "copy_() on an invalid python storage").
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.machine import distributed
from fastguard.trainers.checkpoint import Counted, Job, begun, written


class BackgroundSaver:
    """Saves the checkpoints of one training loop in the background; every rank has one.

    Attributes:
        error: what went wrong with the last save on this rank, until `wait` raises it.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._group: Any = None

    @property
    def running(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        folder: str | Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        counted: Mapping[str, Counted] | None = None,
        keep: int = 2,
    ) -> Path:
        """Begin to write the checkpoint of ``step``; see ``checkpoint.save``. Raises what `wait` raises."""
        self.wait()
        if distributed() and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        job = begun(folder, step, model, optimizer, counted, keep)
        if job.state is not None:
            job = job._replace(state={name: _on_host(value) for name, value in job.state.items()})
            self._thread = threading.Thread(target=self._write, args=(job,), daemon=True)
            self._thread.start()
        return job.final

    def _write(self, job: Job) -> None:
        try:
            written(job, self._group)
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Return when nothing is being written. Raises RuntimeError where the last save has failed on this rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise RuntimeError where the last save has failed on this rank; does not wait."""
        if self.error is not None:
            error, self.error = self.error, None
            raise RuntimeError(f"a checkpoint could not be saved in the background: {error}") from error


def _on_host(value: Any) -> Any:
    """A copy in host memory, of a sharded tensor of its local part."""
    if not isinstance(value, Tensor):
        return value
    if not hasattr(value, "placements"):
        return value.to("cpu", copy=True)
    from torch.distributed.tensor import DTensor

    # The mesh may be of GPUs, to which DTensor.from_local would move the copy back.
    return DTensor(value.to_local().to("cpu", copy=True), value._spec, requires_grad=False)  # type: ignore[attr-defined]

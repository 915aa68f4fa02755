"""A training that may be killed: checkpoints and rows on the way, and an end on SIGTERM that loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastguard.machine import rank, ranks
from fastguard.nested.guard import summed_over_ranks
from fastguard.parallel import compiled_layers
from fastguard.taps.structure import find_structure
from fastguard.trainers.background import BackgroundSaver
from fastguard.trainers.checkpoint import load, save

if TYPE_CHECKING:
    from fastguard.run.journal import Journal
    from fastguard.run.train import Loop


class Stopped(RuntimeError):
    """The run was told to end (SIGTERM), and has saved where it is."""


_asked = False


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM asks the training to save and to end, which it does after its step; there it is `Stopped`.

    Where nothing that could be saved is running, it ends the process at the next step of the next training. Outside the
    main thread, which alone receives signals, nothing changes.
    """
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        global _asked
        if _asked:  # told twice: at once
            raise SystemExit(128 + number)
        _asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Keeper:
    """What a run puts around one training loop: checkpoints in a folder of its own, a journal, compiled layers.

    Args:
        folder: None: nothing is saved. minutes: between checkpoints. keep: how many stay. journal: None: none.
        background: whether training goes on while a checkpoint is written (``trainers.background``).
        backend: of torch.compile, by which layers are compiled; None: they are not.
    """

    def __init__(
        self, folder: Path | None, minutes: float = 10.0, keep: int = 2, journal: Journal | None = None,
        background: bool = False, backend: str | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.minutes, self.keep, self.journal = folder, minutes, keep, journal
        self.backend = backend
        self._background = BackgroundSaver() if background else None
        self._last = time.monotonic()

    @contextlib.contextmanager
    def over(self, loop: Loop) -> Iterator[None]:
        """Inside, ``loop`` goes on from where the latest checkpoint is, if there is one.

        Ends when nothing is being written any more; of several processes one that fails waits for no other.
        """
        if self.folder is not None:
            load(self.folder, loop.method.model, loop.optimizer, loop.counted)
        with contextlib.ExitStack() as held:
            if self.backend is not None:
                held.enter_context(compiled_layers(find_structure(loop.method.model).layers, self.backend))
            if self.journal is not None:
                self.journal.begin(loop)
                held.callback(self.journal.close)
            try:
                yield
            except BaseException:
                if self._background is not None and ranks() == 1:
                    self._background.wait()
                raise
            if self._background is not None:
                self._background.wait()

    def after_step(self, loop: Loop) -> None:
        """Write down the step, and save where it is time.

        Raises `Stopped` on all processes, the state saved, where one was told to end; RuntimeError on all of them where
        one could not write in the background.
        """
        if self.journal is not None:
            self.journal.after_step(loop)
        background = self._background
        busy, failed = (False, False) if background is None else (background.running, background.error is not None)
        due = rank() == 0 and not busy and time.monotonic() - self._last >= 60 * self.minutes
        told, save_now, lost = summed_over_ranks(torch.tensor([float(_asked), float(due), float(failed)])).tolist()
        if background is not None and lost:
            background.check()
            raise RuntimeError("a checkpoint could not be saved in the background by another process")
        where = "no checkpoint was asked for"
        if self.folder is not None and (told or save_now):
            saving = save if background is None else background.save
            saved = saving(self.folder, len(loop.curve), loop.method.model, loop.optimizer, loop.counted, self.keep)
            where = f"saved: {saved}"
            self._last = time.monotonic()
        if told:
            if background is not None:
                background.wait()
            raise Stopped(f"told to end after step {len(loop.curve)}; {where}")

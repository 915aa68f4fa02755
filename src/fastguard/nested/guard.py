"""What an attack must not disturb: an interrupt cannot cut a restoration short, and random numbers are put back."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastguard.nested.profile import span


class Restoring:
    """Puts back what a block has changed, whatever is raised in it; Ctrl-C can cut neither the change nor this short.

        with Restoring() as guard:                        # an interrupt waits from here on
            before = read()
            guard.on_exit(lambda finished: write(before))
            change()
            guard.release()                               # one that has waited is raised, and later ones at once
            ...

    What `on_exit` was given runs when the block is left, with whether it was left without an exception, and must cope
    with a change of which a part was made. Meanwhile an interrupt waits again; it is raised when all is as it was. The
    handler holds by itself once it has raised, so that a second Ctrl-C does not cut short what the first one set off.
    Outside the main thread, which alone receives signals, interrupts are nobody's concern.
    """

    def __init__(self) -> None:
        self._holding = True
        self._kept: tuple[int, FrameType | None] | None = None
        self._before: Any = None
        self._installed = False
        self._restore: Callable[[bool], None] | None = None

    def __enter__(self) -> Restoring:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if callable(self._before):
                signal.signal(signal.SIGINT, self._handle)
                self._installed = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding or self._is_leaving(frame):
            self._kept = number, frame
            return
        self._holding = True
        self._before(number, frame)
        self._holding = False  # a handler that returns has not interrupted anything

    def _is_leaving(self, frame: FrameType | None) -> bool:
        """Whether the signal came in `__exit__`, perhaps before its first line, where nothing is held yet."""
        while frame is not None:
            if frame.f_code is Restoring.__exit__.__code__ and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    def on_exit(self, restore: Callable[[bool], None]) -> None:
        """Call ``restore(finished)`` when the block is left."""
        self._restore = restore

    def hold(self) -> None:
        """Keep interrupts from here on."""
        self._holding = True

    def release(self) -> None:
        """Let interrupts through again, and raise one that was kept."""
        self._holding = False
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self._handle(*kept)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self.hold()
        try:
            if self._restore is not None:
                self._restore(kind is None)
        finally:
            if self._installed:
                signal.signal(signal.SIGINT, self._before)
                if self._kept is not None:
                    self._before(*self._kept)


def on_every_rank(flag: Tensor) -> bool:
    """Whether ``flag`` (0-dim bool) holds on every rank of the job, so that all of them raise, or none does."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return bool(flag)
    value = flag.to(torch.int32)
    distributed.all_reduce(value, op=distributed.ReduceOp.MIN)
    return bool(value)


def summed_over_ranks(values: Tensor) -> Tensor:
    """``values``, summed in place over all ranks of the job."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def derived_seed(*key: object) -> int:
    """A 63-bit seed that is a function of ``key``, equal on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


@contextlib.contextmanager
def own_random_numbers(seed: int, devices: list[torch.device]) -> Iterator[None]:
    """torch's generators run from ``seed`` inside, and go on as if nothing had happened after it.

    Dropout inside an attack then depends on the seed alone, and the training around it on no attack.
    """
    cuda = _cuda(devices)
    with contextlib.ExitStack() as before:
        with span("random numbers"):
            before.enter_context(torch.random.fork_rng(devices=cuda))
            torch.random.default_generator.manual_seed(seed)
            for index in cuda:
                with torch.cuda.device(index):
                    torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            with span("random numbers"):
                before.close()


def same_random_numbers(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """What comes after it draws the same random numbers as what is inside, on the devices of ``tensors``."""
    return torch.random.fork_rng(devices=_cuda([t.device for t in tensors]))


def _cuda(devices: Sequence[torch.device]) -> list[int]:
    """The numbers of the GPUs among the devices."""
    gpus = (d for d in devices if d.type == "cuda")
    return sorted({d.index if d.index is not None else torch.cuda.current_device() for d in gpus})

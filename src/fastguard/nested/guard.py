"""What an attack must not disturb: an interrupt cannot cut a restoration short, and random numbers are put back."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor


class Interrupts:
    """Ctrl-C while weights are tampered with: raised at once, but never during the restoration.

    Use: ``with Interrupts() as interrupts: try: ... finally: try: interrupts.hold() finally: restore``. Between `hold`
    and the end of the block an interrupt is kept, and raised at the end. The handler holds by itself once it has
    raised, so that a second Ctrl-C does not cut short what the first one set off. Outside the main thread, which
    alone receives signals, nothing is done.
    """

    def __init__(self) -> None:
        self._holding = False
        self._kept: tuple[int, FrameType | None] | None = None
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if callable(self._before):
                signal.signal(signal.SIGINT, self._handle)
                self._installed = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._kept = number, frame
            return
        self._holding = True
        self._before(number, frame)
        self._holding = False  # a handler that returns has not interrupted anything

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
        if self._installed:
            signal.signal(signal.SIGINT, self._before)
            if self._kept is not None:
                self._before(*self._kept)


def rank() -> int:
    """This process's rank, 0 where there is but one."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


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
    cuda = sorted(
        {d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"}
    )
    with torch.random.fork_rng(devices=cuda):
        torch.random.default_generator.manual_seed(seed)
        for index in cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield

"""What a nested step does besides model passes: the engine reports here while somebody listens.

    with profile.listening() as found:
        method.backward(**batches)
    found.rows()                            # [{"part": "snapshot", "seconds": ..., "bytes": ...}, ...]

Seconds are the host's. Each part is charged its own time, without that of parts reported inside it; bytes are what its
arithmetic has to read and write, of parameter-sized tensors. While nobody listens a report is one comparison.

Who listens is a context variable: other threads, autograd's own among them, report to nobody, and neither does code
that is being compiled, as dynamo cannot read one.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class Profile:
    """Seconds and bytes by part.

    Attributes:
        seconds, bytes: by the part's name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self._inner = [0.0]  # seconds of the parts inside each one that is open, and of the outermost

    def rows(self) -> list[dict[str, Any]]:
        """``part``, ``seconds`` and ``bytes`` of each, the longest first."""
        order = sorted(self.seconds, key=lambda part: -self.seconds[part])
        return [{"part": p, "seconds": self.seconds[p], "bytes": self.bytes[p]} for p in order]


_LISTENING: ContextVar[Profile | None] = ContextVar("fastguard.nested.profile", default=None)
_NOBODY = contextlib.nullcontext()


@contextlib.contextmanager
def listening() -> Iterator[Profile]:
    """What is reported inside, in this thread; an outer listener does not hear it."""
    token = _LISTENING.set(Profile())
    try:
        found = _LISTENING.get()
        assert found is not None
        yield found
    finally:
        _LISTENING.reset(token)


def span(part: str, tensors: Sequence[Tensor] = (), times: int = 0) -> contextlib.AbstractContextManager[Any]:
    """Charge what runs inside to ``part``, which moves ``times`` the bytes of ``tensors``."""
    if torch.compiler.is_compiling() or (profile := _LISTENING.get()) is None:
        return _NOBODY
    return _Span(profile, part, times * sum(t.numel() * t.element_size() for t in tensors))


class _Span:
    def __init__(self, profile: Profile, part: str, size: int) -> None:
        self.profile, self.part, self.size = profile, part, size

    def __enter__(self) -> None:
        self.profile._inner.append(0.0)
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        profile, whole = self.profile, time.perf_counter() - self.start
        profile.seconds[self.part] += whole - profile._inner.pop()
        profile.bytes[self.part] += self.size
        profile._inner[-1] += whole

"""The process and the machine it runs on: rank, CPU name, memory, files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path


def distributed() -> bool:
    """Whether this process is one of a torch.distributed job."""
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's rank in its torch.distributed job, 0 where there is none."""
    import torch

    return torch.distributed.get_rank() if distributed() else 0


def ranks() -> int:
    """Processes of the job, 1 where there is none."""
    import torch

    return torch.distributed.get_world_size() if distributed() else 1


def cpu_name() -> str:
    """As the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_atomically(file: Path, content: bytes) -> None:
    """Make ``file`` one of ``content``, whole or not at all, on disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: object) -> None:
    """Write JSON, whole or not at all. Raises ValueError for numbers that JSON does not have."""
    write_atomically(file, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else who asks for it works in this folder meanwhile; makes it. Raises RuntimeError where somebody does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system: nothing is promised there
            pass
        except OSError:
            handle.seek(0)
            raise RuntimeError(
                f"out: {folder} is in use by another run (process {handle.read().strip() or 'unknown'}); wait for it, "
                "or choose another folder"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield

"""Processes of a worker script, joined by a file, as tests of distributed code start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def two_processes(
    worker: Path, folder: Path, *arguments: str, passes: Iterable[str] = (), timeout: float = 300
) -> list[str]:
    """`processes`, two of them."""
    return processes(2, worker, folder, *arguments, passes=passes, timeout=timeout)


def processes(
    count: int, worker: Path, folder: Path, *arguments: str, passes: Iterable[str] = (), timeout: float = 300
) -> list[str]:
    """Run ``worker RANK STORE *arguments`` for ranks 0 to count - 1, assert that all end well; what each printed.

    passes: the cases that all have to report, in order, by lines ``passed: CASE``.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder / "store"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    for rank, (process, output) in enumerate(zip(workers, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-6000:]}"
        assert [line for line in output.splitlines() if line.startswith("passed: ")] == [f"passed: {c}" for c in passes]
    return outputs

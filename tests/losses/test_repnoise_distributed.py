"""RepNoiseLoss on two processes (gloo): FSDP2 in several layouts, and DDP. One launch for all cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from losses.distributed_worker import CASES


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    worker = Path(__file__).with_name("distributed_worker.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    for rank, (process, output) in enumerate(zip(workers, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-6000:]}"
        assert [line for line in output.splitlines() if line.startswith("passed: ")] == [f"passed: {n}" for n in CASES]

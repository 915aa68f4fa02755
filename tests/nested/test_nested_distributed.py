"""The nested engine on two processes (gloo): FSDP2 in several layouts, hybrid sharding, DDP. One launch for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import two_processes
from nested.distributed_worker import CASES


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    for output in two_processes(Path(__file__).with_name("distributed_worker.py"), tmp_path):
        assert [line for line in output.splitlines() if line.startswith("passed: ")] == [f"passed: {n}" for n in CASES]

"""Every defense through every trainer and loop, on two processes (gloo), against one. One launch for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import two_processes

pytest.importorskip("trl")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    from trainers.distributed_worker import CASES

    worker = Path(__file__).with_name("distributed_worker.py")
    two_processes(worker, tmp_path, str(tmp_path / "runs"), passes=CASES)

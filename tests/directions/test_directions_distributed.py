"""Estimation and ablation on two processes (gloo): sharded data, FSDP2. One launch for all cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from directions.distributed_worker import CASES
from launch import two_processes


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    two_processes(Path(__file__).with_name("distributed_worker.py"), tmp_path, passes=CASES)

"""Scores and frozen weights on two processes (gloo): divided data, DDP, FSDP2. One launch for all cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import two_processes
from saliency.distributed_worker import CASES


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    two_processes(Path(__file__).with_name("distributed_worker.py"), tmp_path, passes=CASES)

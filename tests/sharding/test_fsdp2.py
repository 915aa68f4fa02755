"""What taps and attacks do beside FSDP2, on two processes (gloo), one launch for all cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import two_processes
from sharding.fsdp2_worker import CASES


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_do_as_fsdp2_was_told(tmp_path):
    two_processes(Path(__file__).with_name("fsdp2_worker.py"), tmp_path, passes=CASES)

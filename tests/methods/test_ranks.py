"""A step of every method on two processes (gloo), against one on the undivided batches. One launch for all cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import two_processes
from methods.ranks_worker import CASES, REFUSED


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_a_step_does_not_depend_on_the_number_of_ranks_nor_hangs_where_one_has_wrong_batches(tmp_path):
    worker = Path(__file__).with_name("ranks_worker.py")
    two_processes(worker, tmp_path, passes=[*CASES, *REFUSED], timeout=500)

"""Models on a mesh of data and tensor parallelism: four processes (gloo), one launch for all cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastguard.ranks import DataRanks, data_ranks
from launch import processes
from sharding.mesh_worker import CASES


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_four_processes_equal_one(tmp_path):
    processes(4, Path(__file__).with_name("mesh_worker.py"), tmp_path, passes=CASES, timeout=500)


def test_a_process_of_its_own_sees_all_data():
    assert data_ranks(torch.nn.Linear(2, 2)) == DataRanks(rank=0, size=1, group=None)

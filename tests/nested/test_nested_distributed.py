"""The nested engine on two processes (gloo): FSDP2 in several layouts, hybrid sharding, DDP. One launch for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastguard.nested import AdamW, PersistentAttacker, SimulatedAttack, Weights
from fastguard.trainers import load
from launch import two_processes
from nested.distributed_worker import CASES, goes_on
from tiny_models import tiny


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    two_processes(Path(__file__).with_name("distributed_worker.py"), tmp_path, passes=CASES)
    model = tiny("llama", torch.float64, num_hidden_layers=2)
    attacker, optimizer = PersistentAttacker(), torch.optim.AdamW(model.parameters())
    assert load(tmp_path / "kept", model, optimizer, {"attacker": attacker}) == 1 and attacker.taken == 2
    with pytest.warns(RuntimeWarning, match="begun anew, since what was saved is of .* another part"):
        goes_on(SimulatedAttack(model, AdamW()), attacker, range(2), 2, 1)
    assert attacker.taken == 1


def test_other_kinds_of_sharding_are_refused():
    fsdp1 = type("FullyShardedDataParallel", (nn.Linear,), {})
    with pytest.raises(ValueError, match="wrapped by FSDP1; expected FSDP2"):
        Weights(nn.Sequential(fsdp1(2, 2)))
    zero = nn.Linear(2, 2)
    zero.weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        Weights(zero)

"""One of four processes that check models on a mesh of data and tensor parallelism: ``mesh_worker.py RANK STORE``.

Prints a line per case; raises at the first that fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard.ranks import DataRanks, data_ranks
from tiny_models import tiny

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Heads and MLPs divided among the ranks of ``mesh`` by torch's own styles, the rest on each."""
    layers = range(len(model.model.layers))
    plan = {f"model.layers.{i}.{name}": ColwiseParallel() for i in layers for name in COLUMNS}
    plan |= {f"model.layers.{i}.{name}": RowwiseParallel() for i in layers for name in ROWS}
    return parallelize_module(model, mesh, plan)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def who_sees_other_data(rank: int) -> None:
    def expect(model: nn.Module, place: int, size: int) -> None:
        found = data_ranks(model)
        assert (found.rank, found.size) == (place, size), found
        if size > 1:
            everyone: list[int] = [-1] * size
            dist.all_gather_object(everyone, found.rank, group=found.group)
            assert everyone == list(range(size)), everyone

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    hybrid = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    expect(tiny(), rank, 4)
    expect(DistributedDataParallel(tiny()), rank, 4)
    expect(shard(tiny(), init_device_mesh("cpu", (4,))), rank, 4)
    expect(shard(tiny(), replicas), rank, 4)
    expect(shard(tensor_parallel(tiny(), square["tp"]), square["dp"]), rank // 2, 2)
    expect(shard(tensor_parallel(tiny(), hybrid["tp"]), hybrid["replicate", "shard"]), rank // 2, 2)
    expect(DistributedDataParallel(nn.Linear(2, 2), process_group=square.get_group("dp")), rank // 2, 2)
    assert data_ranks(tensor_parallel(tiny(), init_device_mesh("cpu", (4,)))) == DataRanks(0, 1, None)
    refused(lambda: data_ranks(tensor_parallel(tiny(), square["tp"])), "tensor-parallel over 2 of 4 ranks")
    experts = tiny()
    fully_shard(experts.model.layers[0], mesh=square["dp"])
    fully_shard(experts, mesh=init_device_mesh("cpu", (4,)))
    refused(lambda: data_ranks(experts), "sharded over different ranks.*expert parallelism")


def refused(call: Callable[[], object], pattern: str) -> None:
    """``call`` raises a ValueError whose message matches."""
    with pytest.raises(ValueError, match=pattern):
        call()


CASES: dict[str, Callable[[int], None]] = {
    "who sees other data": who_sees_other_data,
}


def main() -> None:
    rank, store, only = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if only and name not in only:
            continue
        try:
            case(rank)
        except BaseException as error:
            error.add_note(f"case: {name}")
            raise
        print(f"passed: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

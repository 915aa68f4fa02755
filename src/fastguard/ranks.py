"""Which processes see other data than this one: those over which tokens are counted and gradients averaged.

In a plain job these are all. Tensor-parallel peers are not among them: they run the same sequences, draw the same
dropout and count the same tokens. Imports torch inside its functions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


REFUSED = {
    "cp": "context parallelism",
    "sp": "sequence parallelism",
    "ep": "expert parallelism",
    "pp": "pipeline parallelism",
}


@dataclass(frozen=True)
class DataRanks:
    """The processes over which data differ, as seen from this one.

    Attributes:
        rank, size: this process's place among them, as collectives over ``group`` count, and how many they are.
        group: what collectives over them take; None where this process is the only one and there is nothing to ask.
        divisor: what the sum of their gradients is divided by: their number, or what FSDP2 was told to divide by.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    divisor: float = 1.0


def data_ranks(model: nn.Module) -> DataRanks:
    """The processes whose batches differ from this one's when they train ``model``.

    Whoever averages gradients knows them, and is asked: FSDP2 averages over the mesh that it was given (both dimensions
    of a hybrid one), whatever tensor parallelism has put beside it into the placements of the parameters; DDP over its
    process group. A model that neither wraps is one of the whole job's, unless tensor parallelism spans the job.

    The first call for a hybrid mesh that is smaller than the job makes a process group: call it on every process.

    Raises:
        ValueError: FSDP2 groups with different ranks (expert parallelism) or divide factors. Tensor parallelism over
            some ranks of the job, with nobody to average the gradients of the others.
    """
    from fastguard.machine import distributed

    if not distributed():
        return DataRanks()
    from torch import distributed as dist

    from fastguard.fsdp2 import owners

    groups = owners(model)
    meshes = {tuple(group.mesh_info.mesh.mesh.flatten().tolist()): group.mesh_info.mesh for group in groups}
    if len(meshes) > 1:
        raise ValueError(
            f"model: its FSDP2 groups are sharded over different ranks, {' and '.join(map(str, meshes))}; expected one "
            "set of ranks for all (expert parallelism is not supported)"
        )
    divisors = {group.gradient_divide_factor for group in groups}
    if len(divisors) > 1:
        raise ValueError(
            f"model: its FSDP2 groups divide gradients by different factors, {divisors}; expected one for all"
        )
    if meshes:
        return _of(_group(*meshes.values()), *divisors)
    replicas = [m.process_group for m in model.modules() if hasattr(m, "require_backward_grad_sync")]
    if replicas:
        return _of(replicas[0])
    parallel = max((p.device_mesh.size() for p in model.parameters() if hasattr(p, "device_mesh")), default=1)
    if parallel == 1:
        return _of(dist.group.WORLD)
    if parallel == dist.get_world_size():
        return DataRanks()
    raise ValueError(
        f"model: it is tensor-parallel over {parallel} of {dist.get_world_size()} ranks, and nobody averages gradients "
        "over the others; expected fully_shard or DDP over them"
    )


def tensor_parallel(model: nn.Module) -> bool:
    """Whether matrices of ``model`` are divided among ranks that see the same data."""
    from fastguard.fsdp2 import owners

    data = max((group.mesh_info.mesh.size() for group in owners(model)), default=1)
    return any(p.device_mesh.size() > data for p in model.parameters() if hasattr(p, "device_mesh"))


def refuse_other_parallelism(model: nn.Module) -> None:
    """Raise a ValueError where the ranks of a mesh that ``model`` is sharded over divide sequences, experts or layers.

    They are known by the names that Hugging Face, accelerate and torchtitan give to the dimensions of their meshes.
    """
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        whole = mesh._get_root_mesh()
        for name, size in zip(whole.mesh_dim_names or (), whole.shape, strict=False):
            if name in REFUSED and size > 1:
                raise ValueError(
                    f"model: its device mesh has {size} ranks of {REFUSED[name]} ({name}), which is not supported; "
                    "expected data parallelism (FSDP2, hybrid or DDP), also with tensor parallelism"
                )


def _of(group: Any, divisor: float | None = None) -> DataRanks:
    from torch import distributed as dist

    size = dist.get_world_size(group)
    return DataRanks(dist.get_rank(group), size, group, size if divisor is None else divisor)


def _group(mesh: Any) -> Any:
    """The process group of all of a mesh."""
    from torch import distributed as dist

    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh._flatten("fastguard_" + "_".join(mesh.mesh_dim_names)).get_group()

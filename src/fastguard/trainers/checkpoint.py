"""Save a run and go on with it, bit for bit: what a kill at any moment leaves can be used, on any number of ranks.

A checkpoint holds what training moves: parameters that require a gradient, persistent buffers, the optimizer's state
and settings, the states of defenses and losses, and each rank's random numbers. Sharded tensors go through
torch.distributed.checkpoint, each rank writing its own part. It is written to ``step-N.partial``, synced, renamed to
``step-N``, and then the file ``latest`` is replaced, in one rename, by one that names it.

As many ranks go on with the same bits. Others go on from the same tensors and the counters of rank 0, with random
numbers of their own: each rank draws as a function of those of rank 0 at the save, and of its rank.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastguard.machine import distributed, rank, ranks, sync_folder, write_atomically
from fastguard.nested.guard import derived_seed
from fastguard.taps.structure import reshard

POINTER = "latest"


class Counted(Protocol):
    """A defense, a loss, a scheduler: anything with a state of plain values and tensors, equal on every rank or not."""

    def state_dict(self) -> Mapping[str, Any]:
        """What it needs to go on."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from there."""


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counted: Mapping[str, Counted] | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step`` and point to it; called by every rank. Returns its folder.

    Args:
        folder: on a file system that all ranks share. step: optimizer steps so far.
        model: plain, PEFT, or wrapped by FSDP2 or DDP. optimizer: of this model's parameters; not a wrapper of one.
        counted: by name, what else has a state: the defense, a scheduler, a data loader.
        keep: checkpoints that stay, the new one included.
    """
    job = begun(folder, step, model, optimizer, counted, keep)
    written(job)
    return job.final


class Job(NamedTuple):
    """A checkpoint to be written as ``final``, of which ``keep`` stay; ``state`` is None where it is there already."""

    final: Path
    keep: int
    state: dict[str, Any] | None


def begun(
    folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer,
    counted: Mapping[str, Counted] | None, keep: int,
) -> Job:  # fmt: skip
    """What `save` will write: the live tensors by name, and this rank's own part."""
    final = Path(folder) / f"step-{step:08d}"
    if _pointed_to(final.parent) == final:
        return Job(final, keep, None)
    reshard(model)
    own, moments, large = _own_state(step, model, optimizer, counted or {})
    tensors = {**{name: contiguous(t) for name, t in {**_moving(model), **moments}.items()}, **large}
    return Job(final, keep, {**tensors, f"rank {rank()}": own})


def written(job: Job, group: Any = None) -> None:
    """Write it; called by every rank, which meet in collectives of ``group``."""
    import torch.distributed.checkpoint as dcp

    if job.state is None:
        return
    folder, partial = job.final.parent, job.final.with_suffix(".partial")
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob("*.partial"), job.final):
            if leftover.is_dir():
                shutil.rmtree(leftover)
    _barrier(group)
    dcp.save(job.state, checkpoint_id=partial, process_group=group)
    _barrier(group)
    if rank() == 0:
        sync_folder(partial)
        os.rename(partial, job.final)
        sync_folder(folder)
        write_atomically(folder / POINTER, job.final.name.encode())
        for old in sorted(folder.glob("step-????????"))[: -job.keep]:
            shutil.rmtree(old)
    _barrier(group)


def contiguous(t: Tensor) -> Tensor:
    """``t`` with each rank's part in one piece, which is what torch.distributed.checkpoint can describe.

    Under FSDP2 on top of tensor parallelism a rank's rows are every n-th block of them (``_StridedShard``).
    """
    placements = getattr(t, "placements", None)
    if placements is None:
        return t
    from torch.distributed.tensor import Shard

    plain = tuple(Shard(p.dim) if type(p).__name__ == "_StridedShard" else p for p in placements)
    return t if plain == placements else t.redistribute(placements=plain)  # type: ignore[attr-defined, no-any-return]


def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    counted: Mapping[str, Counted] | None = None,
) -> int:
    """Go on from the latest checkpoint in ``folder``; returns its step, 0 where there is none.

    Arguments as for `save`, made as for a fresh run: the same model, on as many ranks or on others.

    Raises ValueError if the checkpoint is of another number of parameter groups, or of other counted things.
    """
    import torch.distributed.checkpoint as dcp

    path = _pointed_to(Path(folder))
    if path is None:
        return 0
    saved = _read_own(path)
    counted = counted or {}
    if saved["counted"].keys() != counted.keys():
        raise ValueError(f"counted: expected {sorted(saved['counted'])}, as in {path}, got {sorted(counted)}")
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"optimizer: expected {len(saved['groups'])} parameter groups, got {len(optimizer.param_groups)}"
        )
    reshard(model)
    named = dict(model.named_parameters())
    moments = {
        _key(name, slot): torch.empty_like(named[name], dtype=dtype, requires_grad=False)
        for name, slots in saved["moments"].items()
        for slot, dtype in slots.items()
    }
    live = {**_moving(model), **moments}
    large: dict[str, Tensor] = {}
    states = {name: _with(state, f"rank.{saved['whose']}.{name}", large) for name, state in saved["counted"].items()}
    pieces = {**{name: contiguous(t) for name, t in live.items()}, **large}
    dcp.load(pieces, checkpoint_id=path)
    with torch.no_grad():
        for name, t in live.items():
            if pieces[name] is not t:
                t.copy_(pieces[name].redistribute(placements=t.placements))  # type: ignore[attr-defined]
    _load_optimizer(optimizer, saved, named, moments)
    for name, thing in counted.items():
        thing.load_state_dict(states[name])
    random.setstate(saved["python"])
    if saved["ranks"] == ranks():
        torch.set_rng_state(saved["torch"])
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"])
    else:
        torch.manual_seed(derived_seed("resumed", hashlib.sha256(saved["torch"].numpy().tobytes()).digest(), rank()))
    return int(saved["step"])


def packed(state: Any) -> bytes:
    """A small state as bytes; `unpacked` refuses anything but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """What was `packed`."""
    return torch.load(io.BytesIO(content), weights_only=True)


def _moving(model: nn.Module) -> dict[str, Any]:
    """The live tensors that training changes; loading writes into them."""
    persistent = model.state_dict()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {f"model.{name}": t for name, t in {**buffers, **trained}.items()}


def _key(name: str, slot: str) -> str:
    return f"optimizer.{name}.{slot}"


LARGE = 2**10
"""Numbers of a tensor in the state of something counted beyond which it is written as it is, and not packed first."""


def _without(state: Any, key: str, large: dict[str, Tensor]) -> Any:
    """A state whose large tensors are put into ``large``; a meta tensor stands for each."""
    if type(state) is Tensor and state.numel() > LARGE:
        large[key] = state.detach()
        return torch.empty_like(state, device="meta")
    if isinstance(state, dict):
        return {name: _without(value, f"{key}.{name}", large) for name, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_without(value, f"{key}.{i}", large) for i, value in enumerate(state))
    return state


def _with(state: Any, key: str, large: dict[str, Tensor]) -> Any:
    """The state with tensors to be read into where `_without` took them out; they are put into ``large`` too."""
    if type(state) is Tensor and state.is_meta:
        large[key] = torch.empty_like(state, device="cpu")
        return large[key]
    if isinstance(state, dict):
        return {name: _with(value, f"{key}.{name}", large) for name, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_with(value, f"{key}.{i}", large) for i, value in enumerate(state))
    return state


def _own_state(
    step: int, model: nn.Module, optimizer: torch.optim.Optimizer, counted: Mapping[str, Counted]
) -> tuple[bytes, dict[str, Tensor], dict[str, Tensor]]:
    """This rank's part that is no shard; the optimizer's tensors that are shaped, and sharded, like parameters; and
    large tensors of what is counted, which are this rank's own.
    """
    large: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    slots: dict[str, dict[str, torch.dtype]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        for slot, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim() > 0:
                moments[_key(name, slot)] = value
                slots.setdefault(name, {})[slot] = value.dtype
            else:
                scalars.setdefault(name, {})[slot] = value
    own = {
        "step": step,
        "ranks": ranks(),
        "moments": slots,
        "scalars": scalars,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "counted": {
            name: _without(dict(thing.state_dict()), f"rank.{rank()}.{name}", large) for name, thing in counted.items()
        },
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return packed(own), moments, large


def _read_own(path: Path) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    saved_by = [k for k in dcp.FileSystemReader(path).read_metadata().state_dict_metadata if k.startswith("rank ")]
    whose = rank() if len(saved_by) == ranks() else 0
    own: dict[str, Any] = {f"rank {whose}": b""}
    dcp.load(own, checkpoint_id=path)
    found: dict[str, Any] = unpacked(own[f"rank {whose}"])
    return {**found, "whose": whose}


def _load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], named: Mapping[str, nn.Parameter],
    moments: Mapping[str, Tensor],
) -> None:  # fmt: skip
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(settings)
    optimizer.state.clear()
    for name in {**saved["moments"], **saved["scalars"]}:
        shaped = {slot: moments[_key(name, slot)] for slot in saved["moments"].get(name, ())}
        optimizer.state[named[name]] = {**saved["scalars"].get(name, {}), **shaped}


def _pointed_to(folder: Path) -> Path | None:
    pointer = folder / POINTER
    return folder / pointer.read_text().strip() if pointer.exists() else None


def _barrier(group: Any = None) -> None:
    if distributed():
        torch.distributed.barrier(group)

"""FSDP2 (``torch.distributed.fsdp.fully_shard``): its traps, met here, once, and what is read of its state.

* After a forward without backward the root group stays gathered, and the next forward computes on that stale copy:
  every group is resharded before parameters are listed, read or written.
* Gradients that were accumulated without synchronisation wait in a private place, survive ``zero_grad`` and leak into
  the next synchronised backward: they are refused, and those of a backward that was cut short are dropped.
* Inside a trainer's ``no_sync`` a backward leaves ``p.grad`` at None, and one that is not the last may leave it before
  it is written: both are switched on, and given back as the trainer had them.
* It reduces on streams of its own, and other streams read ``p.grad`` too early.
* An exception in the middle of a forward or backward leaves states in which nothing is resharded or reduced any more.
* A parameter that is added after ``fully_shard`` is every rank's own.

Nothing here imports FSDP2: a group is recognised by what it can do.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

STAYS = "_fastguard_stays_gathered"
"""The attribute of a group that `keep_gathered` has in hand."""


def groups_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of ``modules`` that were sharded."""
    return [m for m in modules if hasattr(m, "unshard") and hasattr(m, "reshard")]


def parameter_groups(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """FSDP2's own groups of parameters among ``modules``, each once: mesh, policy, divide factor and parameters."""
    seen = set()
    for state in _states(modules):
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            if group is not None and id(group) not in seen:
                seen.add(id(group))
                yield group


def settle(groups: list[Any]) -> None:
    """Let FSDP2 look at which parameters are trained, and in which dtypes their gradients are reduced.

    It does so at its first forward and never again; for parameters that rest at that time it would not know.
    """
    states = list(_states(groups))
    if all(state._is_root is not None for state in states):
        return
    from torch.distributed._composable_state import _module_state_mapping

    inside = set(groups)
    around = [m for m in list(_module_state_mapping) if not inside.isdisjoint(m.modules())]
    around.sort(key=lambda m: sum(1 for _ in m.modules()), reverse=True)
    for state in _states(around):  # the outermost first, perhaps on a wrapper: it does so for all within it
        state._lazy_init()


def owners(model: nn.Module) -> list[Any]:
    """The groups of the parameters of ``model``, also where ``fully_shard`` stands on a wrapper around it (PEFT's).

    Without a group for a DTensor nobody reduces its gradients: a wrapper that is not seen would be an error that nobody
    sees. So torch's own record of all sharded modules is asked. A group knows its parameters by the modules that they
    are in: whoever loads weights after sharding, as transformers does, may have put others in their places, of which
    FSDP2 hears at its first forward.
    """
    if not torch.distributed.is_available():
        return []
    from torch.distributed._composable_state import _module_state_mapping

    own = {id(m) for m in model.modules()}
    return [
        group
        for group in parameter_groups(list(_module_state_mapping))
        if any(id(p._module_info.module) in own for p in group.fsdp_params)
    ]


def prepare(groups: list[Any]) -> None:
    """Shard every group again, drop what waits to be reduced, and make the next backward reduce its gradients.

    Gradients that were reduced can be read from here on. Raises nothing, as restorations rely on it.
    """
    _recover(groups)
    for group in groups:
        for holder, name in _waiting_gradients(group):
            setattr(holder, name, None)
        reshard([group])
        group.set_requires_gradient_sync(True, recurse=False)
        group.set_is_last_backward(True)
    for parameters in parameter_groups(groups):
        await_reductions(parameters)


def await_reductions(parameters: Any) -> None:
    """Let this stream see what FSDP2 has added to the gradients of a group of parameters, on whichever stream."""
    theirs = parameters.comm_ctx
    for stream in (getattr(theirs, "reduce_scatter_stream", None), getattr(theirs, "all_reduce_stream", None)):
        if stream is not None:  # None before the first forward
            parameters.device_handle.current_stream().wait_stream(stream)
    for p in parameters.fsdp_params:
        if p.grad_offload_event is not None:  # on its way to the host, which no stream waits for
            p.grad_offload_event.synchronize()


def flags(groups: list[Any]) -> Callable[[], None]:
    """What `prepare` changes about the next backward, as a function that gives it back."""
    reduced = [(p, p.reduce_grads, p.all_reduce_grads) for p in parameter_groups(groups)]
    last = [(state, state._state_ctx.is_last_backward) for state in _states(groups)]

    def give_back() -> None:
        for parameters, grads, all_reduced in reduced:
            parameters.reduce_grads, parameters.all_reduce_grads = grads, all_reduced
        for state, value in reversed(last):  # until its first forward each has a context of its own: the root's counts
            state._state_ctx.is_last_backward = value

    return give_back


def reduce_in(groups: list[Any], dtype: torch.dtype) -> Callable[[], None]:
    """Have gradients reduced in ``dtype``, by taps too (``taps.anchor``); a function that puts their own back."""
    settle(groups)
    before = [(p, p._reduce_dtype, p.mp_policy) for p in parameter_groups(groups)]

    def give_back() -> None:
        for parameters, reduce, policy in before:
            parameters._reduce_dtype, parameters.mp_policy = reduce, policy

    for parameters, _, policy in before:
        parameters._reduce_dtype, parameters.mp_policy = dtype, dataclasses.replace(policy, reduce_dtype=dtype)
    return give_back


def reshard(groups: Iterable[Any]) -> None:
    """Shard groups again, but for those that stay gathered for a while (`keep_gathered`)."""
    for group in groups:
        if not getattr(group, STAYS, False):
            group.reshard()


def keep_gathered(groups: list[Any]) -> Callable[[], None]:
    """Have weights that nobody writes to stay gathered after passes; a function that shards them, now and as before.

    What is gathered already is sharded first: it may be stale.
    """
    settle(groups)
    before = [(p, p.post_forward_mesh_info, p.reshard_after_backward) for p in parameter_groups(groups)]

    def give_back() -> None:
        for parameters, after_forward, after_backward in before:
            parameters.post_forward_mesh_info, parameters.reshard_after_backward = after_forward, after_backward
        for group in groups:
            setattr(group, STAYS, False)
        reshard(groups)

    reshard(groups)
    for group in groups:
        setattr(group, STAYS, True)
    for parameters, *_ in before:
        parameters.post_forward_mesh_info, parameters.reshard_after_backward = None, False
    return give_back


def refuse_waiting_gradients(groups: list[Any]) -> None:
    """Raise a RuntimeError if there are gradients that were not reduced."""
    if any(_waiting_gradients(group) for group in groups):
        raise RuntimeError(
            "model: FSDP2 holds gradients that were accumulated without synchronisation (no_sync, "
            "set_requires_gradient_sync(False), set_requires_all_reduce(False)); they would leak into the attack. "
            "Synchronise every micro-batch of a nested defense"
        )


def refuse_unsharded_among_shards(model: nn.Module) -> None:
    """Raise a ValueError where a trainable parameter was added after ``fully_shard``: each rank would train its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [name for name, p in trained if not hasattr(p, "placements")]
    if plain and len(plain) < len(trained):
        raise ValueError(
            f"model: {plain[0]} is not sharded, though others are, so that its gradient stays this rank's own; add "
            "adapters before fully_shard"
        )


def _recover(groups: list[Any]) -> None:
    """Bring FSDP2 out of a forward or backward that an exception cut short.

    Left in the middle of a forward it would not reshard; after half a backward it would not reduce all gradients.
    """
    for group in groups:
        state = next(_states([group]), None)
        if not getattr(state, "_is_root", False) or not _in_the_middle(state):
            continue
        if hasattr(group, "reset_iter_state"):
            group.reset_iter_state()
        else:
            warnings.warn(
                "model: an exception has cut a forward or backward of FSDP2 short, from which this version of torch "
                "cannot recover; go on in a new process",
                stacklevel=4,
            )


def _in_the_middle(root: Any) -> bool:
    """Whether the FSDP2 state of a root is that of an unfinished forward or backward."""
    shared = getattr(root, "_state_ctx", None)
    states = getattr(shared, "all_states", ())
    return getattr(shared, "post_backward_final_callback_queued", False) or any(
        getattr(getattr(state, "_training_state", None), "name", "IDLE") != "IDLE" for state in states
    )


def _states(modules: Iterable[nn.Module]) -> Iterator[Any]:
    for module in modules:
        read: Any = getattr(module, "_get_fsdp_state", None)
        if read is not None:
            yield read()


def _waiting_gradients(group: Any) -> list[tuple[Any, str]]:
    """Where an FSDP2 group holds gradients that it has not reduced: (object, attribute)."""
    found: list[tuple[Any, str]] = []
    for params in parameter_groups([group]):
        if getattr(params, "_partial_reduce_output", None) is not None:  # scattered, but not summed over replicas
            found.append((params, "_partial_reduce_output"))
        for p in params.fsdp_params:
            if getattr(p, "unsharded_accumulated_grad", None) is not None:
                found.append((p, "unsharded_accumulated_grad"))
            unsharded = getattr(p, "_unsharded_param", None)
            if unsharded is not None and unsharded.grad is not None:
                found.append((unsharded, "grad"))
    return found

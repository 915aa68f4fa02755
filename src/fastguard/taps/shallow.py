"""A forward that leaves out the layers above those whose states are read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastguard.taps.structure import Structure, inside
from fastguard.taps.taps import Site, first_tensor, with_first_tensor

FSDP2 = "torch.distributed.fsdp._fully_shard."


@contextlib.contextmanager
def shallow(structure: Structure, model: nn.Module, depth: int) -> Iterator[bool]:
    """In here the layers from number ``depth`` on hand on what they are given, in forwards of this thread.

    What the model's own final norm and head make of that is nobody's; who reads no state above ``depth`` is spared
    these layers' forward and their activations. Yields whether they are left out. They run where something would notice
    that they do not: DDP and its like, which wait for every gradient; torch.compile, which would trace both forms; a
    forward or a hook that is somebody else's; layers of several kinds. FSDP2 gathers their weights for nothing, and
    reduces no gradients of theirs.

    Args:
        structure: of ``find_structure``. model: as it is about to be run, with its wrappers.
        depth: how many layers run, 1 to L.
    """
    layers = [_bare(layer) for layer in structure.layers]
    last, upper = layers[depth - 1], layers[depth:]
    if not upper or not _unnoticed(model, structure, last, upper):
        yield False
        return
    thread, returned = threading.get_ident(), list[Any]()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            returned[:] = [output]

    handle = last.register_forward_hook(keep)
    try:
        for layer in upper:
            layer.forward = _Passing(layer.forward, thread, returned)
        yield True
    finally:
        handle.remove()
        returned.clear()
        for layer in upper:
            vars(layer).pop("forward", None)


class _Passing:
    """A layer's forward that returns its input, in the form in which the layer before returned its output."""

    def __init__(self, forward: Any, thread: int, returned: Sequence[Any]) -> None:
        self.forward, self.thread, self.returned = forward, thread, returned

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.forward(*args, **kwargs)
        x: Tensor = first_tensor(args if args else kwargs["hidden_states"])
        # FSDP2 hands on a view, of which it would warn where the view is returned to it.
        return with_first_tensor(self.returned[0], x.clone() if x._is_view() else x)


def _bare(layer: nn.Module) -> nn.Module:
    within = getattr(layer, "_checkpoint_wrapped_module", layer)
    assert isinstance(within, nn.Module)
    return within


def _unnoticed(model: nn.Module, structure: Structure, last: nn.Module, upper: Sequence[nn.Module]) -> bool:
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        return False
    within: nn.Module | None = model
    while within is not structure.model:  # else a wrapper that waits for every gradient, or one that is not known
        within = None if within is None else inside(within)
        if within is None:
            return False
    for layer in upper:
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        if type(layer) is not type(last) or "forward" in vars(layer) or not all(map(_harmless, hooks)):
            return False
    return True


def _harmless(hook: Any) -> bool:
    """Whether a hook is one of taps, which know what they read, FSDP2's, or transformers' own, idle until asked."""
    return isinstance(hook, Site) or getattr(hook, "__module__", "").startswith(("transformers.", FSDP2))

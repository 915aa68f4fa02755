"""Permanent hooks that hand activations to the scope of the forward in progress.

A *site* is a hook on one module. Hooks added after a model's first compiled call never fire, so sites are
registered once and switched on and off by the scope that their `Taps` holds: a scope while a tapped forward runs,
None between forwards. The scope is the thread's own: a forward of the same model in another thread is not tapped.

A *scope* is what the taps of one forward share. Activation checkpointing runs parts of the forward again
during backward, when the scope of that forward is long gone from the sites, or another has taken its place;
a tap that then reads the wrong scope gives wrong gradients without a word. Hence two bindings:

* the checkpoint functions of the model's modules (transformers' ``_gradient_checkpointing_func``, torch's
  ``CheckpointWrapper.checkpoint_fn``) are wrapped so that what they run re-enters the scope it began in, in
  whichever of autograd's threads it runs again;
* under any other checkpointer the scope is that of the backward in progress, which `Gate` announces; two of
  them in one backward are an error.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes that hold the checkpoint function of a transformers module and of torch's CheckpointWrapper."""


class Scope:
    """What the taps of one forward share; losses subclass it and say in `observe` what a site is worth.

    It must hold no tensor computed from activations once its forward is over: checkpoints keep the scope,
    and the graph keeps the checkpoints.

    Attributes:
        positions: of the batch that its forward runs on, as many as each activation is expected to have; None where
            nobody knows.
    """

    positions: int | None = None

    def __init__(self) -> None:
        self.grad_enabled = torch.is_grad_enabled()

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> Tensor | None:
        """Take the statistic of activation ``x`` at site (kind, index); a tensor returned takes the activation's place.

        keep: False in a recompute, where the same operations must run and their results be dropped.
        """
        raise NotImplementedError

    def end(self) -> None:
        """Drop everything that was computed from activations; called when the forward is over or failed."""
        raise NotImplementedError


class _Off(Scope):
    """The scope of a forward that is not tapped, so that its recompute is not tapped either."""

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> None:
        return None

    def end(self) -> None:
        pass


OFF = _Off()


class Inert:
    """What a site becomes in a deep copy or a pickle of the model: it must not reach into the original's store."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


def first_tensor(value: Any) -> Tensor:
    """The activation in a module's output: the tensor itself or the first tensor of a tuple or a list."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        for item in value:
            if isinstance(item, Tensor):
                return item
    raise TypeError(f"tapped module: expected a tensor or a tuple that holds one, got {type(value).__name__}")


def with_first_tensor(value: Any, replacement: Tensor) -> Any:
    """``value`` with ``replacement`` in the place of its `first_tensor`."""
    if isinstance(value, Tensor):
        return replacement
    at = next(i for i, item in enumerate(value) if isinstance(item, Tensor))
    return type(value)((*value[:at], replacement, *value[at + 1 :]))


class Site:
    """A forward hook: shows the output of its module to the scope of the moment."""

    def __init__(self, taps: Taps, module: nn.Module, kind: str, index: int) -> None:
        self.taps, self.module, self.kind, self.index = taps, module, kind, index

    def register(self) -> RemovableHandle:
        """Put the hook on its module."""
        return self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook that torch calls."""
        replacement = self.fire(output)
        return None if replacement is None else with_first_tensor(output, replacement)

    def fire(self, value: Any) -> Tensor | None:
        """Let the scope observe ``value``, if there is one; returns what it put in its place."""
        serving = self.serving()
        if serving is None:
            return None
        scope, keep = serving
        x = first_tensor(value)
        known = scope.positions is not None and not torch.compiler.is_compiling()
        if known and x.shape[:-1].numel() != scope.positions:
            raise ValueError(
                f"{type(self.module).__name__}: an activation of shape {tuple(x.shape)} in a forward of "
                f"{scope.positions} positions; expected all of them on each rank (sequence parallelism is not "
                "supported: tensor-parallel layers take and return whole sequences)"
            )
        return scope.observe(self.kind, self.index, x, keep)

    def serving(self) -> tuple[Scope, bool] | None:
        """The scope that this site is to serve now, and whether results are kept; None where it is switched off."""
        scope, recomputing = self.taps.serving()
        if scope is None or scope is OFF:
            return None
        if scope.grad_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self.module).__name__} runs without gradients inside a forward that has them, as under "
                "reentrant activation checkpointing, which would silently drop this tap's gradient. Use the "
                "non-reentrant form: gradient_checkpointing_enable({'use_reentrant': False})"
            )
        return scope, not recomputing

    def __reduce__(self) -> tuple[Any, ...]:
        return Inert, ()


class InputSite(Site):
    """A forward pre-hook: shows the first input of its module to the scope of the moment."""

    def register(self) -> RemovableHandle:
        """Put the hook on its module."""
        return self.module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The hook that torch calls."""
        replacement = self.fire(args if args else kwargs.get("hidden_states"))
        if replacement is None:
            return None
        if args:
            return with_first_tensor(args, replacement), kwargs
        return args, {**kwargs, "hidden_states": replacement}


class _Bound:
    """A function that runs with the scopes that were on when it was handed to a checkpoint."""

    def __init__(self, run: Callable[..., Any], taps: Sequence[Taps]) -> None:
        self.run = run
        self.bound = [(each, each.scope or OFF) for each in taps]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(each.closed and scope is not OFF for each, scope in self.bound):
            raise RuntimeError(
                "taps: an activation checkpoint recomputes a tapped forward whose hooks are off the model, which would "
                "give gradients of another function. Call backward before the loss is closed or the context left"
            )
        before = [each.scope for each, _ in self.bound]
        for each, scope in self.bound:
            each.scope = scope
        try:
            return self.run(*args, **kwargs)
        finally:
            for (each, _), previous in zip(self.bound, before, strict=True):
                each.scope = previous


class BoundCheckpoint:
    """Stands in for a module's checkpoint function; copies and pickles get the function itself."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.taps: list[Taps] = []

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the checkpoint function on ``run`` bound to the scopes of this moment."""
        if torch.compiler.is_compiling():  # the compiled recompute reads graph inputs, no scope
            return self.function(run, *args, **kwargs)
        return self.function(_Bound(run, self.taps), *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (self.function,)


def _side_effects_under_checkpoints() -> contextlib.AbstractContextManager[Any]:
    """Let a model compiled in this forward keep taps' results inside its checkpoints: a recompute drops them anyway.

    A process that has compiled nothing has not imported dynamo, and is spared it.
    """
    config: Any = getattr(sys.modules.get("torch._dynamo"), "config", None)
    if not hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        return contextlib.nullcontext()
    patch: contextlib.AbstractContextManager[Any] = config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    return patch


class _Active(threading.local):
    """The scope of the tapped forward, or of its recomputation, that this thread runs."""

    scope: Scope | None = None


class Taps:
    """The sites of one loss on one model.

    Args:
        model: the module under which every site and checkpoint function is found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: list[Site] = []
        self._handles: list[RemovableHandle] = []
        self.closed = False
        self._active = _Active()
        self._live: dict[int, list[weakref.ref[Scope]]] = {}

    @property
    def scope(self) -> Scope | None:
        """The scope that the sites serve in this thread; None between tapped forwards."""
        return self._active.scope

    @scope.setter
    def scope(self, scope: Scope | None) -> None:
        self._active.scope = scope

    def serving(self) -> tuple[Scope | None, bool]:
        """The scope of the forward, or of its recomputation, that runs in this thread, and whether it is the latter."""
        scope = self.scope
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        return (self.scope_of_backward() if scope is None and recomputing else scope), recomputing

    def output(self, module: nn.Module, kind: str, index: int = 0) -> None:
        """Tap the output of ``module``."""
        self.add(Site(self, module, kind, index))

    def input(self, module: nn.Module, kind: str, index: int = 0) -> None:
        """Tap the first input of ``module``."""
        self.add(InputSite(self, module, kind, index))

    def add(self, site: Site) -> None:
        """Put a site of a caller's own kind on its module."""
        self.sites.append(site)
        self._handles.append(site.register())

    def check_open(self) -> None:
        """Raise a RuntimeError after `close`."""
        if self.closed:
            raise RuntimeError(
                "taps: the loss or defense that they belong to was closed and its hooks are off the model; construct "
                "it again"
            )

    @contextlib.contextmanager
    def on(self, scope: Scope) -> Iterator[None]:
        """Serve ``scope`` while one forward runs; whatever happens in it, the sites end up switched off.

        Raises RuntimeError inside another such forward of this thread, and after `close`.
        """
        self.check_open()
        if self.scope is not None:
            raise RuntimeError("taps: a tapped forward is already in progress on this model; it cannot be nested")
        self._bind_checkpoints()
        try:
            self.scope = scope
            with _side_effects_under_checkpoints():
                yield
        finally:
            self.scope = None
            scope.end()

    def _bind_checkpoints(self) -> None:
        """Wrap checkpoint functions not yet wrapped: checkpointing may be switched on at any time."""
        for module in self.model.modules():
            for name in CHECKPOINT_FUNCTIONS:
                function = module.__dict__.get(name)
                if function is None:
                    continue
                if not isinstance(function, BoundCheckpoint):
                    function = BoundCheckpoint(function)
                    setattr(module, name, function)
                if self not in function.taps:
                    function.taps.append(self)

    def begin_backward(self, scope: Scope) -> None:
        """Note that the backward in progress belongs to ``scope`` (see `Gate`)."""
        for task in [task for task, scopes in list(self._live.items()) if not any(ref() for ref in scopes)]:
            self._live.pop(task, None)
        live = self._live.setdefault(torch._C._current_graph_task_id(), [])
        if not any(ref() is scope for ref in live):  # several outputs of one forward have a gate each
            live.append(weakref.ref(scope))

    def scope_of_backward(self) -> Scope | None:
        """The scope that the backward in progress belongs to, for a recompute that carries none of its own."""
        refs = self._live.get(torch._C._current_graph_task_id(), ())
        live = [scope for ref in refs if (scope := ref()) is not None]
        if len(live) > 1:
            raise RuntimeError(
                f"taps: a checkpoint recomputes in a backward of {len(live)} tapped forwards and its checkpoint "
                "function is not known to fastguard, so that the tap cannot tell which forward it belongs to. Call "
                "backward once per forward, or use the model's gradient_checkpointing_enable or torch's "
                "checkpoint_wrapper"
            )
        return live[0] if live else None

    def close(self) -> None:
        """Remove every hook and give the model its own checkpoint functions back."""
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            for name in CHECKPOINT_FUNCTIONS:
                function = module.__dict__.get(name)
                if isinstance(function, BoundCheckpoint):
                    function.taps = [each for each in function.taps if each is not self]
                    if not function.taps:
                        setattr(module, name, function.function)
        self._handles, self.sites, self.closed = [], [], True


class Gate(torch.autograd.Function):
    """Identity on a loss: the first thing its backward does is to tell the taps whose backward this is."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, taps: Taps, scopes: Sequence[Scope]) -> Tensor:
        """Return the loss; ``scopes`` are those of the forwards that it was computed from."""
        ctx.taps, ctx.scopes = taps, scopes
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Pass the gradient on."""
        for scope in ctx.scopes:
            ctx.taps.begin_backward(scope)
        return grads[0], None, None

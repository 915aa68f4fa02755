"""The residual stream of a model, changed while forwards run: ablation, activation addition, rotation.

An ablated stream has no part along some directions. It starts without one if the first layer's input is projected, and
it stays so if everything that is added to it is: L layers write twice, so that 2 L + 1 projections suffice (Arditi et
al. 2024 make 3 L). Taking a share of each write's part is what an edit of the weights would do, W <- W - s Q^T Q W, and
what is meant by a ``scale`` other than 1. Layers of the common pre-norm form make the first of their two
projections inside the residual add and the norm that follows it (`taps.writes`); that is so for scale 1 alone, where
projecting the sum and projecting what is added are one.

Everything is differentiable. Under activation checkpointing the backward runs inside the context as well, since a
recomputation after it would be of another function, which raises.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.directions.basis import orthonormalise
from fastguard.directions.prompts import compiled
from fastguard.ops.project_out import project_out
from fastguard.taps import Structure, Taps, find_structure
from fastguard.taps.taps import Scope
from fastguard.taps.writes import PreNorm, Writes, find_writes, fused_layer

STREAM, WRITE, LAST = "stream", "write", "last"


class _Changing(Scope):
    """What a context does at each site; holds nothing that was computed from activations."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_enabled = False  # forwards with and without gradients may run in one context
        self.fired = self.over = False

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> Tensor | None:
        if self.over:
            raise _left()
        self.fired = True
        return self.change(kind, index, x)

    def change(self, kind: str, index: int, x: Tensor) -> Tensor | None:
        """What takes the place of ``x``, or None."""
        raise NotImplementedError

    def end(self) -> None:
        pass


class _PerDevice:
    """A constant on each device that a model is spread over: one tensor each, since ops look at a basis once."""

    def __init__(self, value: Tensor) -> None:
        self._held = {value.device: value}
        self._value = value

    def on(self, device: torch.device) -> Tensor:
        """The constant on ``device``."""
        if device not in self._held:
            self._held[device] = self._value.to(device)
        return self._held[device]


class _StreamTaps(Taps):
    """Taps whose scope is known to recomputations in autograd's other threads while its context is open."""

    current: _Changing | None = None

    def scope_of_backward(self) -> Scope | None:
        return self.current


_open: list[_StreamTaps] = []
"""Those of the contexts that are open now."""


@contextlib.contextmanager
def _suspended() -> Iterator[None]:
    """No stream is changed by this thread: a model's parts are found as they are."""
    before = [(taps, taps.scope) for taps in _open]
    try:
        for taps, _ in before:
            taps.scope = None
        yield
    finally:
        for taps, scope in before:
            taps.scope = scope


class _Ablating(_Changing):
    def __init__(self, basis: Tensor, scale: float, index: Tensor | None, preserve: bool = False) -> None:
        super().__init__()
        self.basis, self.scale, self.preserve = _PerDevice(basis), scale, preserve
        self.exact = _PerDevice(basis.detach().cpu().double())  # not every device has float64
        self.index = None if index is None else _PerDevice(index)
        self.fused: frozenset[int] = frozenset()
        self.stepping = False  # a fused layer runs its own forward

    def index_on(self, device: torch.device) -> Tensor | None:
        return None if self.index is None else self.index.on(device)

    def change(self, kind: str, index: int, x: Tensor) -> Tensor | None:
        if (kind == STREAM and index == 0) or (kind == WRITE and (self.stepping or index not in self.fused)):
            few = x.numel() <= FEW * x.shape[-1] and x.device.type != "mps"  # which has no float64
            if few and self.index is None and not self.preserve and _plain():
                return _few(x, self.exact.on(x.device), self.scale)
            basis, index_of = self.basis.on(x.device), self.index_on(x.device)
            return project_out(x, basis, self.scale, basis_index=index_of, preserve_norm=self.preserve)
        return None


FEW = 64
"""Rows up to which two calls of torch are faster than one of an op: a step of generation is all overhead."""


def _plain() -> bool:
    """Whether this is a forward and nothing else, so that torch's own calls may stand for the op's."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _few(x: Tensor, basis: Tensor, scale: float) -> Tensor:
    """``project_out`` of a few rows; in float64, which no setting makes tf32 or bf16 of."""
    rows = x.reshape(-1, x.shape[-1]).double()
    return torch.addmm(rows, rows @ basis.mT, basis, alpha=-scale).to(x.dtype).view(x.shape)


class _Adding(_Changing):
    def __init__(self, vector: Tensor, layer: int, coefficient: float, index: Tensor | None) -> None:
        super().__init__()
        self.vector, self.layer, self.coefficient = _PerDevice(vector), layer, coefficient
        self.index = None if index is None else _PerDevice(index)

    def change(self, kind: str, index: int, x: Tensor) -> Tensor | None:
        if kind != STREAM or index != self.layer:
            return None
        added = (self.coefficient * self.vector.on(x.device)).to(x.dtype)
        if self.index is not None:
            added = added[self.index.on(x.device)][:, None]
        return x + added


class _Rotating(_Changing):
    def __init__(self, plane: Tensor, angle: float) -> None:
        super().__init__()
        self.plane = _PerDevice(plane)
        self.to = math.cos(angle), math.sin(angle)

    def change(self, kind: str, index: int, x: Tensor) -> Tensor | None:
        if kind == WRITE:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        plane = self.plane.on(x.device).to(wide)
        part = x.to(wide) @ plane.mT
        aim = torch.linalg.vector_norm(part, dim=-1, keepdim=True) * part.new_tensor(self.to)
        return (x.to(wide) + (aim - part) @ plane).to(x.dtype)


class Stream:
    """The residual stream of a causal language model, found by structure; hooks that are off outside its contexts.

    Args:
        model: any Hugging Face causal language model, also inside PEFT, DDP or ``torch.compile``, or sharded by FSDP2.
            A compiled model must not have been called before, or its hooks do not fire, which raises.
        structure: of ``find_structure``, where it is known already.

    Attributes:
        structure: the model's parts.
        writes: where each layer writes to the stream.

    Raises:
        ValueError: the model's structure, or where its layers write, is not recognised.
    """

    def __init__(self, model: nn.Module, structure: Structure | None = None) -> None:
        self.model = model
        with _suspended():
            self.structure = find_structure(model) if structure is None else structure
            self.writes: tuple[Writes, ...] = find_writes(self.structure, model)
        self._taps = _StreamTaps(self.structure.model)
        for index, writes in enumerate(self.writes):
            self._taps.input(writes.layer, STREAM, index)
            for module in writes.modules:
                self._taps.output(module, WRITE, index)
        self._taps.output(self.writes[-1].layer, LAST)

    @property
    def width(self) -> int:
        """Features of the stream."""
        return int(self.structure.head.weight.shape[1])  # type: ignore[index, union-attr, arg-type]

    @contextlib.contextmanager
    def ablated(
        self,
        directions: Tensor,
        scale: float = 1.0,
        *,
        basis_index: Tensor | None = None,
        norm_preserving: bool = False,
        fused: bool = True,
    ) -> Iterator[None]:
        """While it lasts, forwards of the model run with ``directions`` taken out of the stream (see `ablate`).

        Args:
            directions: [D], [K, D], or [G, K, D] with ``basis_index``; any lengths, K <= 64.
            scale: the share of each write's part that is taken away.
            basis_index: [B] integers, each sample's basis; -1 leaves it as it is.
            norm_preserving: bring each write back to its length.
            fused: let layers of the common form make residual add, projection and norm in one pass.
        """
        self._check("directions", directions, (1, 2) if basis_index is None else (3,))
        _check_number("scale", scale)
        if basis_index is not None:
            _check_index(basis_index, directions.shape[0], lowest=-1)
        scope = _Ablating(orthonormalise(directions.detach()), float(scale), basis_index, norm_preserving)
        with contextlib.ExitStack() as stack:
            if fused and scale == 1 and not norm_preserving:
                scope.fused = frozenset(i for i, w in enumerate(self.writes) if self._fuse(w, scope, stack))
            stack.enter_context(self._on(scope))
            yield

    @contextlib.contextmanager
    def added(
        self, vector: Tensor, layer: int, coefficient: float = 1.0, *, index: Tensor | None = None
    ) -> Iterator[None]:
        """While it lasts, ``coefficient`` x ``vector`` is added to layer ``layer``'s input (see `add`).

        Args:
            vector: [D], or [G, D] with ``index``.
            index: [B] integers, each sample's vector.
        """
        self._check("vector", vector, (1,) if index is None else (2,))
        _check_number("coefficient", coefficient)
        if index is not None:
            _check_index(index, vector.shape[0], lowest=0)
        if not 0 <= layer < len(self.writes):
            raise ValueError(f"layer: expected 0 to {len(self.writes) - 1}, got {layer}")
        with self._on(_Adding(vector.detach(), layer, float(coefficient), index)):
            yield

    @contextlib.contextmanager
    def rotated(self, plane: Tensor, angle: float) -> Iterator[None]:
        """While it lasts, the stream's part in ``plane`` [2, D] points to ``angle`` in it (see `rotate`)."""
        self._check("plane", plane, (2,))
        if plane.shape[0] != 2:
            raise ValueError(f"plane: expected two directions, got {plane.shape[0]}")
        _check_number("angle", angle)
        with self._on(_Rotating(orthonormalise(plane.detach()), angle)):
            yield

    def close(self) -> None:
        """Take the hooks off the model."""
        self._taps.close()

    def _check(self, name: str, value: Tensor, dims: tuple[int, ...]) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dim() not in dims or value.shape[-1] != self.width or not value.numel():
            shapes = {1: "[D]", 2: "[K, D]", 3: "[G, K, D] with basis_index"}
            expected = " or ".join(shapes[n] for n in dims)
            raise ValueError(f"{name}: expected {expected} with D = {self.width}, got shape {tuple(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")

    @contextlib.contextmanager
    def _on(self, scope: _Changing) -> Iterator[None]:
        with self._taps.on(scope):
            self._taps.current = scope
            _open.append(self._taps)
            try:
                yield
            finally:
                _open.remove(self._taps)
                self._taps.current, scope.over = None, True
        if not scope.fired and compiled(self.model):
            raise RuntimeError(
                "directions: no forward of the compiled model passed the hooks on its stream, so that nothing was "
                "changed. Construct Stream before the first call of a compiled model, or use ablate, add or rotate, "
                "which run it uncompiled"
            )

    def _fuse(self, writes: Writes, scope: _Ablating, stack: contextlib.ExitStack) -> bool:
        """Give a layer its fused forward until ``stack`` is left; whether that is possible now."""
        layer, parts = writes.layer, writes.pre_norm
        if parts is None or "forward" in vars(layer) or FUSED in vars(layer) or _hooked(parts.norm2):
            return False
        kind: Any = type(layer)
        stack.callback(_own_class, layer, kind)
        vars(layer)[FUSED] = _Fused(parts, scope, self._taps)
        layer.__class__ = _fused_class(kind)
        return True


FUSED = "_fastguard_fused"
"""The attribute in which a layer of a fused class holds its `_Fused`."""


@dataclass(frozen=True)
class _Fused:
    """What makes a layer's forward fused in the forwards of one scope."""

    parts: PreNorm
    scope: _Ablating
    taps: _StreamTaps

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The fused forward, or ``own`` where another thread's forward passes."""
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self.taps.scope is not self.scope and not (self.taps.scope is None and recomputing):
            return own(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        device = hidden.device
        if hidden.shape[-2] == 1 and _plain():  # a step of generation
            self.scope.stepping = True
            try:
                return own(*args, **kwargs)
            finally:
                self.scope.stepping = False
        return fused_layer(self.parts, self.scope.basis.on(device), self.scope.index_on(device), *args, **kwargs)


@functools.cache
def _fused_class(kind: Any) -> Any:
    """A subclass of a layer's class with the fused forward.

    A forward set on the layer itself would pass by the activation checkpointing that transformers wraps around the
    forwards of its classes, of subclasses too.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused: _Fused | None = vars(self).get(FUSED)
        if fused is None:
            raise _left()
        return fused(functools.partial(kind.forward, self), *args, **kwargs)

    functools.update_wrapper(forward, kind.forward)
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _own_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.__class__ = kind
    vars(layer).pop(FUSED, None)


def _left() -> RuntimeError:
    return RuntimeError(
        "directions: an activation checkpoint recomputes a forward whose context was left, which would give "
        "gradients of another function; call backward inside it"
    )


def _hooked(module: nn.Module) -> bool:
    """Whether someone watches a module that the fused form does not call, or shards it on its own."""
    sharded = any(hasattr(p, "device_mesh") for p in module.parameters(recurse=False)) and hasattr(module, "unshard")
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks) or sharded


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _check_index(index: Tensor, groups: int, lowest: int) -> None:
    if index.dim() != 1 or index.is_floating_point() or not index.numel():
        raise ValueError(f"basis_index: expected integers [B], got {index.dtype} of shape {tuple(index.shape)}")
    if int(index.min()) < lowest or int(index.max()) >= groups:
        raise ValueError(
            f"basis_index: expected {lowest} to {groups - 1}, got {int(index.min())} to {int(index.max())}"
        )


@contextlib.contextmanager
def _stream(model: nn.Module) -> Iterator[Stream]:
    """A stream for one context. A compiled model runs uncompiled in it: new hooks would not fire in compiled code."""
    eager: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if compiled(model):
        eager = torch.compiler.set_stance("force_eager")
    with eager:
        stream = Stream(model)
        try:
            yield stream
        finally:
            stream.close()


@contextlib.contextmanager
def ablate(
    model: nn.Module,
    directions: Tensor,
    scale: float = 1.0,
    *,
    basis_index: Tensor | None = None,
    norm_preserving: bool = False,
    fused: bool = True,
) -> Iterator[nn.Module]:
    """Run ``model`` without some directions: Arditi et al. (2024), arXiv 2406.11717, without touching a weight.

    Inside, every forward of the model (also of a wrapper, and each step of ``generate``) has the directions projected
    out of the first layer's input and of all that layers write to the stream. On leaving, whatever is raised, hooks and
    forwards are as they were.

    Args:
        model: any Hugging Face causal language model, found by structure; PEFT, DDP, FSDP2; a compiled one runs
            uncompiled inside (`Stream`, constructed before its first call, keeps it compiled).
        directions: [D], [K, D] with K <= 64, or [G, K, D] with ``basis_index``; of any lengths.
        scale: 1 takes all of each write's part away, 0.5 half of it.
        basis_index: [B] integers, each sample's basis out of G; -1 leaves it as it is.
        norm_preserving: bring what is left of each write, and of the first layer's input, back to the length that it
            had: a token's row of an attention's or MLP's output, or of the embedding. The stream, their sum, has no
            part along the directions and keeps no norm. Not what ``edit.norm_columns`` makes of the weights, which
            keeps the norms of columns, and so of a write only where one input feature makes it: at the embedding the
            two are one, elsewhere not. There is no fused form.
        fused: let layers of the common pre-norm form make residual add, projection and norm in one pass. The rounding
            differs: the norm is of fp32 rows.

    Yields:
        The model.

    Raises:
        ValueError: directions that do not fit, or a model whose structure is not recognised.
    """
    with (
        _stream(model) as stream,
        stream.ablated(directions, scale, basis_index=basis_index, norm_preserving=norm_preserving, fused=fused),
    ):
        yield model


@contextlib.contextmanager
def add(model: nn.Module, vector: Tensor, layer: int, coefficient: float = 1.0) -> Iterator[nn.Module]:
    """Run ``model`` with ``coefficient`` x ``vector`` [D] added to the input of layer ``layer``, at all positions.

    Activation addition as Arditi et al. use it: the vector is a difference of means, of its own length. ``model`` as in
    `ablate`. Raises ValueError for a vector, layer or model that does not fit.
    """
    with _stream(model) as stream, stream.added(vector, layer, coefficient):
        yield model


@contextlib.contextmanager
def rotate(model: nn.Module, plane: Tensor, angle: float) -> Iterator[nn.Module]:
    """Run ``model`` with its stream's part in a plane turned to one angle: angular steering (arXiv 2510.26243).

    With u, v the orthonormal basis of ``plane`` [2, D] and P the projection on it, h becomes
    h - P h + |P h| (cos(angle) u + sin(angle) v) at every layer's input and at the last layer's output. |h| is kept. At
    pi / 2 the part along u is gone, which is ablation of u; towards 0 it grows, which is addition of u, by as much as
    the plane holds. ``model`` as in `ablate`.

    Raises ValueError for a plane or model that does not fit.
    """
    with _stream(model) as stream, stream.rotated(plane, angle):
        yield model

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.directions.basis import orthonormalise
from fastguard.ops.project_out import project_out
from fastguard.taps import Structure, Taps, find_structure
from fastguard.taps.structure import compiled
from fastguard.taps.taps import Gate, Scope
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


class _Basis:
    """Orthonormal rows, as the ops take them and in float64."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = _PerDevice(rows)
        self.exact = _PerDevice(rows.detach().cpu().double())  # not every device has float64


class _StreamTaps(Taps):
    """Taps whose scope is known to recomputations in autograd's other threads while its context is open."""

    current: _Changing | None = None

    def scope_of_backward(self) -> Scope | None:
        return self.current or super().scope_of_backward()


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


class Ablation(_Changing):
    """What an ablation takes out, and of which samples; of `Stream.ablation`.

    Args:
        bases: by layer, orthonormal rows [K, D], or [G, K, D] with ``index``; layers that are not named are left alone.
        scale: the share of each write's part that is taken away. index: [B], each sample's basis; -1 leaves it alone.
        shared: whether the basis is one for all layers, so that no layer's input but the first needs projecting.
        fuse: let layers that can run their fused form. preserve: bring what is projected back to its length.
    """

    def __init__(
        self, bases: Mapping[int, _Basis], scale: float = 1.0, index: Tensor | None = None, *, shared: bool = False,
        fuse: bool = True, preserve: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bases, self.scale, self.shared, self.preserve = bases, scale, shared, preserve
        self.fuse = fuse and scale == 1 and not preserve
        self.samples, self.index = index, None if index is None else _PerDevice(index)
        self.fused: frozenset[int] = frozenset()
        self.stepping = False  # a fused layer runs its own forward

    def of(self, index: Tensor | None) -> Ablation:
        """The same directions out of other samples."""
        return Ablation(
            self.bases, self.scale, index, shared=self.shared, fuse=self.fuse, preserve=self.preserve
        )  # fmt: skip

    def on(self, layer: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The basis of ``layer``, or None, and the samples' index."""
        basis = self.bases.get(layer)
        return (None if basis is None else basis.rows.on(device)), (
            None if self.index is None else self.index.on(device)
        )

    def change(self, kind: str, index: int, x: Tensor) -> Tensor | None:
        """See `_Changing`."""
        if kind == LAST or (kind == STREAM and self.shared and index):
            return None
        if index not in self.bases or (kind == WRITE and index in self.fused and not self.stepping):
            return None
        few = x.numel() <= FEW * x.shape[-1] and x.device.type != "mps"  # which has no float64
        if few and self.index is None and not self.preserve and _plain():
            return _few(x, self.bases[index].exact.on(x.device), self.scale)
        basis, samples = self.on(index, x.device)
        assert basis is not None
        if samples is not None and x.dim() == 2:  # OPT's MLPs work on flattened tokens
            samples = samples.repeat_interleave(x.shape[0] // samples.shape[0])
        return project_out(x, basis, self.scale, basis_index=samples, preserve_norm=self.preserve)


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
        lasting: contexts may be left before the backward of what ran in them, as a loss that others differentiate does.
            Layers then have their fused forward until `close`, and loss values go through `gated`.

    Attributes:
        structure: the model's parts.
        writes: where each layer writes to the stream.

    Raises:
        ValueError: the model's structure, or where its layers write, is not recognised.
    """

    def __init__(self, model: nn.Module, structure: Structure | None = None, *, lasting: bool = False) -> None:
        self.model, self.lasting = model, lasting
        with _suspended():
            self.structure = find_structure(model) if structure is None else structure
            self.writes: tuple[Writes, ...] = find_writes(self.structure, model)
        self._taps = _StreamTaps(self.structure.model)
        for index, writes in enumerate(self.writes):
            self._taps.input(writes.layer, STREAM, index)
            for module in writes.modules:
                self._taps.output(module, WRITE, index)
        self._taps.output(self.writes[-1].layer, LAST)
        self._kept = contextlib.ExitStack()
        self._fused = self._fuse(self._kept) if lasting else frozenset[int]()

    @property
    def width(self) -> int:
        """Features of the stream."""
        return int(self.structure.head.weight.shape[1])  # type: ignore[index, union-attr, arg-type]

    def ablation(
        self,
        directions: Tensor | Mapping[int, Tensor],
        scale: float = 1.0,
        *,
        basis_index: Tensor | None = None,
        norm_preserving: bool = False,
        fused: bool = True,
    ) -> Ablation:
        """What `ablated` takes out, made orthonormal once, to be used in many contexts; arguments as there."""
        _check_number("scale", scale)
        named: Mapping[int, Tensor]
        if shared := not isinstance(directions, Mapping):
            named = dict.fromkeys(range(len(self.writes)), directions)
        else:
            named = directions
        bases: dict[int, _Basis] = {}
        made: dict[int, _Basis] = {}
        for layer, each in named.items():
            if not isinstance(layer, int) or not 0 <= layer < len(self.writes):
                raise ValueError(f"directions: expected layers 0 to {len(self.writes) - 1}, got {layer!r}")
            if id(each) not in made:
                self._check("directions", each, (1, 2) if basis_index is None else (3,))
                if basis_index is not None:
                    _check_index(basis_index, each.shape[0], lowest=-1)
                made[id(each)] = _Basis(orthonormalise(each.detach()))
            bases[layer] = made[id(each)]
        return Ablation(
            bases, float(scale), basis_index, shared=shared, fuse=fused, preserve=norm_preserving
        )  # fmt: skip

    @contextlib.contextmanager
    def ablated(
        self,
        directions: Tensor | Mapping[int, Tensor] | Ablation,
        scale: float = 1.0,
        *,
        basis_index: Tensor | None = None,
        norm_preserving: bool = False,
        fused: bool = True,
    ) -> Iterator[Ablation]:
        """While it lasts, forwards of the model run with ``directions`` taken out of the stream (see `ablate`).

        Yields what `gated` wants to know of these forwards.

        Args:
            directions: [D], [K, D], or [G, K, D] with ``basis_index``; any lengths, K <= 64. Or such by layer, where
                layers differ: each then projects its input and what it writes off its own, and layers that are not
                named do nothing. Or an `ablation`, which has the other arguments.
            scale: the share of each write's part that is taken away.
            basis_index: [B] integers, each sample's basis; -1 leaves it as it is.
            norm_preserving: bring each write back to its length.
            fused: let layers of the common form make residual add, projection and norm in one pass.
        """
        if isinstance(directions, Ablation):
            scope = directions.of(directions.samples)  # a forward is told from another by its scope
        else:
            scope = self.ablation(
                directions, scale, basis_index=basis_index, norm_preserving=norm_preserving, fused=fused
            )
        with contextlib.ExitStack() as stack:
            if scope.fuse:
                could = self._fused if self.lasting else self._fuse(stack)
                scope.fused = frozenset(i for i in could if not _hooked(_norm2(self.writes[i])))
            stack.enter_context(self._on(scope))
            yield scope

    def plain(self) -> contextlib.AbstractContextManager[Ablation]:
        """While it lasts, forwards run as they are, which `gated` tells from ablated ones of the same backward."""
        return self.ablated(Ablation({}, fuse=False))

    def gated(self, value: Tensor, forwards: Sequence[Ablation]) -> Tensor:
        """``value``, computed from what ``forwards`` of a lasting stream gave, ready for its backward."""
        return Gate.apply(value, self._taps, forwards) if value.requires_grad else value  # type: ignore[no-any-return]

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
        self._kept.close()
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
                self._taps.current, scope.over = None, not self.lasting
        if not scope.fired and compiled(self.model):
            raise RuntimeError(
                "directions: no forward of the compiled model passed the hooks on its stream, so that nothing was "
                "changed. Construct Stream before the first call of a compiled model, or use ablate, add or rotate, "
                "which run it uncompiled"
            )

    def _fuse(self, stack: contextlib.ExitStack) -> frozenset[int]:
        """Give layers their fused forward until ``stack`` is left; those of which that is possible now."""
        done = set()
        for index, writes in enumerate(self.writes):
            layer, parts = writes.layer, writes.pre_norm
            if parts is None or "forward" in vars(layer) or vars(layer).get(FUSED) or _hooked(parts.norm2):
                continue
            kind: Any = type(layer)
            stack.callback(_own_class, layer, kind, self.lasting)
            vars(layer)[FUSED] = _Fused(parts, index, self._taps)
            layer.__class__ = _fused_class(kind)
            done.add(index)
        return frozenset(done)


FUSED = "_fastguard_fused"
"""The attribute in which a layer of a fused class holds its `_Fused`; None after a lasting stream was closed."""


@dataclass(frozen=True)
class _Fused:
    """What makes a layer's forward fused in the forwards of a scope that says so."""

    parts: PreNorm
    layer: int
    taps: _StreamTaps

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The fused forward, or ``own`` where the layer's is not to be fused, or another thread's forward passes."""
        scope, _ = self.taps.serving()
        if not isinstance(scope, Ablation) or self.layer not in scope.fused:
            return own(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        basis, samples = scope.on(self.layer, hidden.device)
        if basis is None:
            return own(*args, **kwargs)
        if hidden.shape[-2] == 1 and _plain():  # a step of generation
            scope.stepping = True
            try:
                return own(*args, **kwargs)
            finally:
                scope.stepping = False
        return fused_layer(self.parts, basis, samples, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # a copy of the model has forwards of its own


def _nothing() -> None:
    return None


def _empty(kind: Any) -> Any:
    return kind.__new__(kind)


@functools.cache
def _fused_class(kind: Any) -> Any:
    """A subclass of a layer's class with the fused forward, whose copies and pickles are of the class itself.

    A forward set on the layer itself would pass by the activation checkpointing that transformers wraps around the
    forwards of its classes, of subclasses too.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if FUSED not in vars(self):
            raise _left()
        own = functools.partial(kind.forward, self)
        fused: _Fused | None = vars(self)[FUSED]
        return own(*args, **kwargs) if fused is None else fused(own, *args, **kwargs)

    def reduced(self: nn.Module, protocol: Any) -> Any:
        _, _, *more = kind.__reduce_ex__(self, protocol)
        return _empty, (kind,), *more

    functools.update_wrapper(forward, kind.forward)
    named = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": reduced}
    return type(kind.__name__, (kind,), {"forward": forward, **named})


def _own_class(layer: nn.Module, kind: type[nn.Module], lasting: bool) -> None:
    """Undo `Stream._fuse` on a layer, which FSDP2 may have given a class on top of the fused one."""
    fused: Any = _fused_class
    if type(layer) is fused(kind):
        layer.__class__ = kind
        vars(layer).pop(FUSED, None)
    elif lasting:
        vars(layer)[FUSED] = None
    else:
        vars(layer).pop(FUSED, None)


def _norm2(writes: Writes) -> nn.Module:
    assert writes.pre_norm is not None
    return writes.pre_norm.norm2


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

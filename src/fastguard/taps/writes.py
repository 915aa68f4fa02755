"""Where a decoder's layers write to the residual stream, found by watching them add, not by names.

A layer turns its input h into h + m (a + b): the outputs a and b of two of its children (attention and MLP, or the
norms that Gemma 2 and OLMo 2 put behind them), which are *added*, times a number m (Granite). A probe forward tells
which children those are: the ones whose outputs make up the difference.

Layers of the common form, x = h + attention(norm1(h)), x + mlp(norm2(x)), can also be run by `fused_layer`, in which
the first add, a projection and the second norm are one pass over the stream. That form is recognised by what the
children were given and is believed only where it gives the layer's own output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.taps.structure import Structure, _leaf, _norm_kind, _quiet, _run
from fastguard.taps.taps import first_tensor


@dataclass(frozen=True)
class PreNorm:
    """The parts of a layer x = h + attention(norm1(h)), x + mlp(norm2(x)).

    Attributes:
        hidden: the name by which attention gets the hidden states, or None for its first place.
        passed: the names of the layer's arguments that attention gets as they are; None for all of them.
        kind, eps: of norm2, as ``ops/final_norm`` names them.
        names: of the arguments that the layer's forward takes by place; the first is the stream.
    """

    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    hidden: str | None
    passed: frozenset[str] | None
    kind: str
    eps: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Writes:
    """What one layer adds to the stream.

    Attributes:
        layer: the decoder layer, without a checkpoint wrapper.
        modules: the children whose outputs it adds, one or two.
        plain: whether each is attention or MLP itself, with no norm behind it.
        pre_norm: its parts, where `fused_layer` gives what it gives.
    """

    layer: nn.Module
    modules: tuple[nn.Module, ...]
    plain: bool
    pre_norm: PreNorm | None


@dataclass
class _Seen:
    """What a probe saw of one layer; children's calls in order of completion."""

    x: Tensor | None = None
    calls: list[tuple[nn.Module, Tensor, Tensor, str | None]] = field(default_factory=list)
    kinds: dict[nn.Module, tuple[str | None, float]] = field(default_factory=dict)
    found: Writes | None = None


def find_writes(structure: Structure, model: nn.Module | None = None) -> tuple[Writes, ...]:
    """One `Writes` a layer. Runs a forward of a few tokens, in evaluation mode, without gradients.

    Args:
        structure: of ``find_structure``.
        model: what wraps the structure's model, if anything; its FSDP2 groups are sharded again afterwards.

    Raises:
        ValueError: a layer's output is not its input plus what some of its children returned.
    """
    base = structure.model
    seen = [_Seen() for _ in structure.layers]
    layers = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in structure.layers]
    handles = []
    busy = False  # children called to compare forms are not part of the probe

    def before_layer(state: _Seen) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not busy:
                state.x = first_tensor(args if args else kwargs["hidden_states"]).clone()

        return hook

    def after_child(state: _Seen, child: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal busy
            given = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            name = None if args else next((k for k, v in kwargs.items() if v is given), None)
            if busy or not isinstance(given, Tensor) or not _holds_tensor(output):
                return
            state.calls.append((child, given.clone(), first_tensor(output).clone(), name))
            if _leaf(child) and not any(p.dim() > 1 for p in child.parameters()):
                busy = True
                state.kinds[child] = _norm_kind(child, base, given, child.forward(given))
                busy = False

        return hook

    def after_layer(index: int, state: _Seen) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal busy
            if busy or state.x is None:
                return
            busy = True
            state.found = _writes(index, module, structure, state, args, kwargs, output)
            busy = False

        return hook

    try:
        for index, (layer, state) in enumerate(zip(layers, seen, strict=True)):
            handles.append(layer.register_forward_pre_hook(before_layer(state), with_kwargs=True))
            for child in layer.children():
                handles.append(child.register_forward_hook(after_child(state, child), with_kwargs=True))
            handles.append(layer.register_forward_hook(after_layer(index, state), with_kwargs=True))
        with _quiet(base if model is None else model, base):
            _run(base, structure.arguments, structure.vocabulary)
    finally:
        for handle in handles:
            handle.remove()
    found = [state.found for state in seen]
    if any(each is None for each in found):
        raise ValueError(f"model: its layer {found.index(None)} took no part in a forward")
    return tuple(each for each in found if each is not None)


def _holds_tensor(output: Any) -> bool:
    return isinstance(output, Tensor) or (
        isinstance(output, (tuple, list)) and any(isinstance(item, Tensor) for item in output)
    )


def _writes(
    index: int, layer: nn.Module, structure: Structure, seen: _Seen, args: Any, kwargs: Any, output: Any
) -> Writes:
    assert seen.x is not None
    x, y = seen.x, first_tensor(output)
    blocks = [structure.mlps[index]]
    if structure.attentions:
        blocks.insert(0, structure.attentions[index])
    chains = [_chain(block, seen, x.shape) for block in blocks]
    combinations: list[list[tuple[nn.Module, Tensor]]] = [[]]
    for chain in chains:
        combinations = [[*before, link] for before in combinations for link in chain]
    for chosen in combinations:
        if chosen and _adds_up(x, y, [written for _, written in chosen]):
            modules = tuple(module for module, _ in chosen)
            plain = modules == tuple(blocks)
            pre_norm = _pre_norm(layer, seen, modules, args, kwargs, output) if plain and len(modules) == 2 else None
            return Writes(layer, modules, plain, pre_norm)
    raise ValueError(
        f"model: layer {index} ({type(layer).__name__}) does not add its attention's and its MLP's output (or those of "
        "norms behind them) to its input, so that it is not known where it writes to the residual stream"
    )


def _chain(block: nn.Module, seen: _Seen, shape: torch.Size) -> list[tuple[nn.Module, Tensor]]:
    """The block and the leaves behind it, each given what the one before returned, with their outputs."""
    at = next((i for i in reversed(range(len(seen.calls))) if seen.calls[i][0] is block), None)
    if at is None:
        return []
    chain = [(block, seen.calls[at][2])]
    for module, given, returned, _ in seen.calls[at + 1 :]:
        last = chain[-1][1]
        if _leaf(module) and given.numel() == last.numel() and torch.equal(given.reshape(last.shape), last):
            chain.append((module, returned))
    return [(module, y.reshape(shape)) for module, y in chain if y.numel() == shape.numel()]


def _adds_up(x: Tensor, y: Tensor, written: list[Tensor]) -> bool:
    """Whether y = x + m (sum of what was written) for some number m, to rounding."""
    difference, total = y.double() - x.double(), sum(w.double() for w in written)
    assert isinstance(total, Tensor)
    square = float(total.square().sum())
    if square == 0:
        return bool((difference == 0).all())
    m = float((difference * total).sum()) / square
    size = max(float(t.double().abs().max()) for t in (x, y, *written))
    return m != 0 and float((difference - m * total).abs().max()) <= 8 * torch.finfo(y.dtype).eps * size * max(
        1, abs(m)
    )


def _pre_norm(
    layer: nn.Module, seen: _Seen, modules: tuple[nn.Module, ...], args: Any, kwargs: Any, output: Any
) -> PreNorm | None:
    """The layer's parts, if it has the common form and `fused_layer` agrees with it on the probe."""
    attention, mlp = modules
    assert seen.x is not None
    if not isinstance(output, Tensor) or "forward" in vars(layer) or _drops_out(layer):  # someone else's, accelerate's
        return None
    calls = {module: (given, returned, name) for module, given, returned, name in seen.calls}
    norm1 = next((m for m in seen.kinds if torch.equal(calls[m][1], calls[attention][0])), None)
    norm2 = next((m for m in seen.kinds if _equal(calls[m][1], calls[mlp][0])), None)
    if norm1 is None or norm2 is None or norm1 is norm2 or not _equal(calls[norm1][0], seen.x):
        return None
    kind, eps = seen.kinds[norm2]
    hooked = len(norm2._forward_hooks) + len(norm2._forward_pre_hooks) > 1  # one is the probe's
    if kind is None or not eps > 0 or hooked or any(hasattr(p, "device_mesh") for p in norm2.parameters()):
        return None
    accepted = inspect.signature(attention.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in inspect.signature(layer.forward).parameters.values() if p.kind in places)
    found = PreNorm(
        norm1, attention, norm2, mlp, calls[attention][2], None if takes_all else frozenset(accepted), kind, eps,
        names,
    )  # fmt: skip
    try:
        again = fused_layer(found, None, None, *args, **kwargs)
    except (TypeError, ValueError, RuntimeError):  # attention does not take the layer's arguments under their names
        return None
    if again.shape != output.shape:
        return None
    size = float(output.double().abs().max())
    rounding = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)  # float64 models norm in float32
    close = float((again.double() - output.double()).abs().max()) <= 16 * rounding * size
    return found if close else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _drops_out(layer: nn.Module) -> bool:
    """Whether the layer itself, between its children, drops activations out when it is trained."""
    modules = [child for child in layer.children() if isinstance(child, nn.Dropout)]
    rates = [value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]
    return any(child.p > 0 for child in modules) or any(rate > 0 for rate in rates)


def fused_layer(parts: PreNorm, basis: Tensor | None, basis_index: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """A pre-norm layer's forward, its stream projected off ``basis`` at both writes; without one, the layer's own.

    Args:
        basis, basis_index: as ``add_project_rms_norm`` takes them.
        *args, **kwargs: the arguments of the layer's forward.
    """
    from fastguard.ops.add_project_rms_norm import add_project_rms_norm
    from fastguard.ops.project_out import project_out

    given = {**dict(zip(parts.names, args, strict=False)), **kwargs}
    x: Tensor = given.pop(parts.names[0])
    passed = {name: v for name, v in given.items() if parts.passed is None or name in parts.passed}
    normed = parts.norm1(x)
    attended = (
        parts.attention(**{parts.hidden: normed}, **passed) if parts.hidden else parts.attention(normed, **passed)
    )
    weight, bias = getattr(parts.norm2, "weight", None), getattr(parts.norm2, "bias", None)
    stream, normed = add_project_rms_norm(
        x, first_tensor(attended), basis, weight, parts.eps, kind=parts.kind, bias=bias, basis_index=basis_index
    )
    update = first_tensor(parts.mlp(normed))
    return stream + (update if basis is None else project_out(update, basis, basis_index=basis_index))

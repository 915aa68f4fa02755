"""Find a causal language model's head, final norm, decoder layers and MLPs by watching it run, not by names.

A probe forward of a few tokens records every module's input and output. The final norm is the module that
produced the head's input; the decoder layers are the ModuleList whose last item produced the norm's input; a
layer's MLP is the last of its children, attention aside, that has weight matrices and returns a hidden state;
its attention is the child so named that does.
What the probe found is then verified: scale(head(norm(h))) must be the model's logits.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastguard import fsdp2
from fastguard.ops.final_norm import portable as final_norm
from fastguard.ops.vocabulary import Norm
from fastguard.taps.anchor import full
from fastguard.taps.taps import Taps, first_tensor

PROBE_TOKENS = 4

HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a head's weight may be; the codes of a quantised one are no weights."""


@dataclass(frozen=True)
class Structure:
    """The parts of a causal language model.

    Attributes:
        model: the model under every wrapper (DDP, PEFT, compiled).
        head, norm, layers, mlps: its modules; one MLP per layer.
        norm_kind: a kind of ``ops/final_norm``, or None for a norm that is called as a module.
        norm_eps: the norm's epsilon.
        scale, softcap: what the model does to the head's output (see ``lm_head_stats``).
        vocabulary: columns of the head.
        arguments: the names of the arguments of the model's forward.
        attentions: one attention module per layer; none at all where some layer has none that is found, so that
            who needs them can say so.
    """

    model: nn.Module
    head: nn.Module
    norm: nn.Module
    layers: tuple[nn.Module, ...]
    mlps: tuple[nn.Module, ...]
    norm_kind: str | None
    norm_eps: float
    scale: float
    softcap: float | None
    vocabulary: int
    arguments: frozenset[str]
    attentions: tuple[nn.Module, ...] = ()


@dataclass
class _Call:
    module: nn.Module
    x: Tensor | None
    y: Tensor


def inside(model: nn.Module) -> nn.Module | None:
    """What PEFT, torch.compile or a checkpoint wrapper has wrapped; None where ``model`` is none of these."""
    if hasattr(model, "get_base_model"):
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise ValueError("model: prompt tuning adds positions to the hidden states and is not supported; use LoRA")
        return model.get_base_model()  # type: ignore[operator, no-any-return]
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if hasattr(model, name):
            return getattr(model, name)  # type: ignore[no-any-return]
    return None


def _wraps(model: nn.Module) -> bool:
    """Whether all that ``model`` has is another module, as DistributedDataParallel and its like."""
    return [name for name, _ in model.named_children()] == ["module"]


def unwrap(model: nn.Module) -> nn.Module:
    """The language model inside torch.compile, DistributedDataParallel, PEFT and checkpoint wrappers."""
    while True:
        if hasattr(model, "_fsdp_wrapped_module"):
            raise ValueError("model: FSDP1 flattens the head's weight; use FSDP2 (torch.distributed.fsdp.fully_shard)")
        within = inside(model)
        if within is None and _wraps(model):
            within = model.module  # type: ignore[assignment]
        if within is None:
            return model
        model = within


def synchronised(model: nn.Module, base: nn.Module | None = None) -> bool:
    """Whether something that sees to the ranks' gradients stands around ``model``, or shards it in place.

    FSDP2's groups; around it DDP and its like, or, where ``base`` is the language model, anything but PEFT,
    torch.compile and checkpoint wrappers.
    """
    if any(hasattr(module, "unshard") for module in model.modules()):
        return True
    while model is not base:
        within = inside(model)
        if within is None:
            return base is not None or _wraps(model) or hasattr(model, "_fsdp_wrapped_module")
        model = within
    return False


def compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` stands around the model or any part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def head_parameters(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] and bias [V] that a head computes with; with LoRA on it, base plus delta (differentiable).

    Raises ValueError where the head has no weight matrix, or a quantised one.
    """
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"model: its head {type(head).__name__} has no [V, D] weight")
    if weight.dtype not in HEAD_DTYPES:
        raise ValueError(
            f"model: its head {type(head).__name__} has a weight of {weight.dtype}; expected float32, bfloat16, "
            "float16 or float64. Leave the head out of the quantisation"
        )
    if hasattr(head, "get_delta_weight") and not head.disable_adapters and not head.merged:
        for adapter in head.active_adapters:  # type: ignore[union-attr]
            if adapter in head.lora_A or adapter in head.lora_embedding_A:  # type: ignore[operator]
                weight = weight + head.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
    return weight, bias if isinstance(bias, Tensor) else None


def find_structure(model: nn.Module, mlp_of: Callable[[nn.Module], nn.Module] | None = None) -> Structure:
    """Probe ``model`` and return its parts. Runs two forwards of a few tokens, in evaluation mode, no gradients.

    Args:
        model: a causal language model that takes ``input_ids`` and returns logits; it may be wrapped.
        mlp_of: from a decoder layer to the module whose output counts as its MLP's, where the rule fails.

    Raises:
        ValueError: no head, final norm, layers or MLPs are found, the logits are not head(norm(h)) up to a scale and
            a soft-cap, or they are not finite.
    """
    base = unwrap(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError("model: expected a decoder-only language model, got an encoder-decoder")
    arguments = frozenset(inspect.signature(base.forward).parameters)
    head = output_head(base)
    weight, _ = head_parameters(head)
    if weight.device.type == "meta":
        raise ValueError("model: its parameters are on the meta device; load them before the loss is constructed")
    with _quiet(model, base):
        calls, logits = _record(base, arguments, weight.shape[0])
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"model: its logits are not finite on a few tokens; {_not_finite(base)}")
        at = _last(calls, head)
        if at is None or calls[at].x is None:
            raise ValueError(f"model: its head {type(head).__name__} took no part in a forward")
        normed = calls[at].x
        assert normed is not None
        norm_call = next((c for c in calls[:at] if _leaf(c.module) and _same(c.y, normed)), None)
        if norm_call is None or norm_call.x is None:
            raise ValueError("model: no module produces the head's input; expected a final norm before the head")
        layers = _layers(base, calls, norm_call.x)
        width = norm_call.x.shape[-1]
        mlps = tuple(
            _mlp(layer, i, calls, width) if mlp_of is None else mlp_of(layer) for i, layer in enumerate(layers)
        )
        attentions = [_attention(layer, calls, width) for layer in layers]
        scale, softcap = _transform(calls[at].y, logits, base)
        kind, eps = _verify(base, arguments, head, norm_call, normed)
    found = tuple(attention for attention in attentions if attention is not None)
    return Structure(
        base, head, norm_call.module, layers, mlps, kind, eps, scale, softcap, weight.shape[0], arguments,
        found if len(found) == len(layers) else (),
    )  # fmt: skip


def tap_hidden_states(taps: Taps, structure: Structure) -> None:
    """Tap the L + 1 entries of transformers' ``hidden_states``, at index 0 to L.

    The first layer's input and the outputs of all layers but the last are of kind ``hidden``; the last entry is not
    the last layer's output but the final norm's, and of kind ``norm``.
    """
    taps.input(structure.layers[0], "hidden", 0)
    for i, layer in enumerate(structure.layers[:-1]):
        taps.output(layer, "hidden", i + 1)
    taps.output(structure.norm, "norm", len(structure.layers))


def output_head(base: nn.Module) -> nn.Module:
    """The head of a language model as it stands now. Raises ValueError where there is none."""
    getter = getattr(base, "get_output_embeddings", None)
    head = getter() if callable(getter) else getattr(base, "lm_head", None)
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"model: {type(base).__name__} has no language model head (get_output_embeddings gave {head!r})"
        )
    return head


@contextlib.contextmanager
def _quiet(model: nn.Module, base: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode, and every FSDP2 shard, is put back."""
    try:
        with evaluated(base), torch.no_grad():
            yield
    finally:
        reshard(model)


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def reshard(model: nn.Module) -> None:
    """Shard every FSDP2 group again: after a forward without backward the root computes on a stale full copy."""
    fsdp2.reshard(fsdp2.groups_of(model.modules()))


def _run(base: nn.Module, arguments: frozenset[str], vocabulary: int) -> Tensor:
    device = next(base.parameters()).device
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None] % vocabulary
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in arguments else {}
    out = base(input_ids=ids, **options)
    return out.logits if hasattr(out, "logits") else first_tensor(out)


def _record(base: nn.Module, arguments: frozenset[str], vocabulary: int) -> tuple[list[_Call], Tensor]:
    """Every module call in order of completion, and the logits."""
    calls: list[_Call] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        with contextlib.suppress(TypeError):
            calls.append(_Call(module, _whole(given[0]) if given else None, _whole(first_tensor(output))))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in base.modules() if m is not base]
    try:
        return calls, _run(base, arguments, vocabulary)
    finally:
        for handle in handles:
            handle.remove()


def _whole(activation: Tensor) -> Tensor:
    """As a plain tensor: tensor-parallel modules of torch are handed DTensors."""
    return full(activation) if hasattr(activation, "full_tensor") else activation


def _not_finite(base: nn.Module) -> str:
    """Which parameters are not finite, for an error; of a shard this rank's part."""
    names = []
    for name, p in base.named_parameters():
        local = p.detach().to_local() if hasattr(p, "to_local") else p.detach()  # type: ignore[attr-defined]
        if local.is_floating_point() and not bool(torch.isfinite(local).all()):
            names.append(name)
    if not names:
        return "its weights are, so they overflow on the way"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"expected finite weights, got others in {', '.join(names[:3])}{more}"


def _last(calls: list[_Call], module: nn.Module) -> int | None:
    return next((i for i in reversed(range(len(calls))) if calls[i].module is module), None)


def _leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _layers(base: nn.Module, calls: list[_Call], last: Tensor) -> tuple[nn.Module, ...]:
    """The ModuleList whose last item returned ``last``."""
    by_module = {call.module: call for call in calls}
    for candidate in base.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate):
            call = by_module.get(candidate[-1])
            if call is not None and _same(call.y, last):
                return tuple(candidate)
    raise ValueError("model: no ModuleList of decoder layers ends in the final norm's input")


def _blocks(layer: nn.Module, attention: bool, calls: list[_Call], width: int) -> list[nn.Module]:
    """The layer's children, attention by name or not, that have weight matrices and returned a hidden state."""
    layer = getattr(layer, "_checkpoint_wrapped_module", layer)
    children = {
        child
        for name, child in layer.named_children()
        if ("attn" in name.lower() or "attention" in name.lower()) == attention
        if any(p.dim() >= 2 for p in child.parameters())
    }
    return [c.module for c in calls if c.module in children and c.y.shape[-1] == width]


def _attention(layer: nn.Module, calls: list[_Call], width: int) -> nn.Module | None:
    called = _blocks(layer, True, calls, width)
    return called[0] if called else None


def _mlp(layer: nn.Module, index: int, calls: list[_Call], width: int) -> nn.Module:
    called = _blocks(layer, False, calls, width)
    if not called:
        raise ValueError(
            f"model: layer {index} ({type(layer).__name__}) has no child that looks like an MLP; name it by mlp_of="
        )
    return called[-1]


def _text_config(base: nn.Module) -> Any:
    config: Any = getattr(base, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _close(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(b.dtype).eps
    return bool((a.double() - b.double()).abs().max() <= 8 * eps * b.double().abs().max().clamp_min(1e-30))


def _transform(raw: Tensor, logits: Tensor, base: nn.Module) -> tuple[float, float | None]:
    """(scale, softcap) that turn the head's output into the logits."""
    config = _text_config(base)

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if value else None

    divisor = number("logits_scaling")
    scales = [number("logit_scale"), 1 / divisor if divisor else None, 1.0]
    caps = [number("final_logit_softcapping"), None]
    # What the config declares comes first: small logits look alike with and without a soft-cap.
    for cap in dict.fromkeys(caps):
        for scale in dict.fromkeys(s for s in scales if s is not None):
            z = raw.double() * scale
            z = cap * torch.tanh(z / cap) if cap else z
            if _close(z.to(logits.dtype), logits):
                return scale, cap
    raise ValueError(
        "model: its logits are not its head's output up to final_logit_softcapping, logit_scale or logits_scaling "
        f"of the config (largest difference {float((raw.double() - logits.double()).abs().max()):.3g})"
    )


def _verify(
    base: nn.Module, arguments: frozenset[str], head: nn.Module, norm_call: _Call, normed: Tensor
) -> tuple[str | None, float]:
    """(norm kind, eps); raises unless head_parameters gives what the head computes.

    The norm is called on probe vectors from its own pre-forward hook, where FSDP has gathered it. The head's output is
    looked at instead: tensor parallelism acts around it.
    """
    found: dict[str, Any] = {}

    def at_norm(module: nn.Module, args: Any) -> None:
        rows = first_tensor(args).reshape(-1, normed.shape[-1])
        generator = torch.Generator().manual_seed(0)
        scales = torch.tensor([1e-3, 1e-2, 0.1, 1, 10, 30])[:, None]  # small ones tell epsilons apart
        noise = scales * torch.randn(len(scales), rows.shape[-1], generator=generator)
        x = torch.cat([rows, noise.to(rows)])
        found["norm"] = _norm_kind(module, base, x, module.forward(x))

    def at_head(module: nn.Module, args: Any, output: Any) -> None:
        weight, bias = head_parameters(module)
        gathered = full(weight, device=normed.device), None if bias is None else full(bias, device=normed.device)
        expected = torch.nn.functional.linear(normed, *gathered)
        found["head"] = _close(expected, first_tensor(output))

    handles = [norm_call.module.register_forward_pre_hook(at_norm), head.register_forward_hook(at_head)]
    try:
        _run(base, arguments, head_parameters(head)[0].shape[0])
    finally:
        for handle in handles:
            handle.remove()
    if not found["head"]:
        raise ValueError(f"model: its head {type(head).__name__} is not a linear map by its weight and bias")
    kind, eps = found["norm"]
    if kind is None:
        warnings.warn(
            f"final norm {type(norm_call.module).__name__}: neither an RMS nor a layer norm; it will be called as a "
            "module, and every layer keeps a copy of its normed rows",
            stacklevel=4,
        )
    return kind, eps


def _norm_kind(norm: nn.Module, base: nn.Module, x: Tensor, y: Tensor) -> tuple[str | None, float]:
    """The kind and the epsilon whose arithmetic comes nearest to ``y``, the norm's output; (None, 0) if none does."""
    config = _text_config(base)
    named = [getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")]
    candidates = {float(v) for v in (*vars(norm).values(), *named) if isinstance(v, float) and 0 <= v < 0.1}
    candidates.add(torch.finfo(x.dtype).eps)  # nn.RMSNorm's own default
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    best: tuple[float, str | None, float] = (float("inf"), None, 0.0)
    for kind in ("rms", "rms_offset", "layer"):
        for eps in sorted(candidates):
            z = final_norm.apply(x, Norm(kind, weight, bias if kind == "layer" else None, eps))
            error = float(((z - y).double().norm(dim=-1) / y.double().norm(dim=-1).clamp_min(1e-30)).max())
            best = min(best, (error, kind, eps), key=lambda item: item[0])
    rounding = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)  # float64 models norm in float32
    return (best[1], best[2]) if best[0] <= 8 * rounding else (None, 0.0)

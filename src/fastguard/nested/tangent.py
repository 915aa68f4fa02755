"""The exact product of a loss's Hessian with a direction: forward mode over the backward, one pass, no step length.

Each parameter carries its direction as a tangent through the forward and the backward; the gradient's tangent is H d.
A difference of gradients over a step has an error of the step's order, and in low precision it is the rounding of two
gradients divided by the step. Here nothing cancels: the product is as accurate as a gradient.

Cost: every product of the forward and the backward is made twice or thrice, and the activations are held twice, without
activation checkpointing (whose recomputation drops tangents, and which is therefore left out of this pass).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastguard.nested.guard import Restoring
from fastguard.nested.weights import Weights
from fastguard.taps.taps import CHECKPOINT_FUNCTIONS


def hessian_product(
    weights: Weights, directions: Sequence[Tensor | None], loss: Callable[[], Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """``loss()``, detached, and H d: one tensor a parameter, None where the loss does not depend on it.

    Args:
        weights: what the Hessian is of; plain tensors. directions: one a parameter, in its dtype and shape, None for 0.
        loss: runs the model and returns a 0-dim loss made of torch's own operations (``methods.passes.model_loss``).

    A tied head's padding row moves in the head, and not where it is looked up.
    Attention may be ``eager`` or ``sdpa``, whose plain form is chosen inside. No gradient is left on the parameters.

    Raises:
        ValueError: shards or replicas; an operation of the model that forward mode does not know (flash attention,
            fused kernels), or a loss that depends on no parameter.
    """
    if weights.sharded or weights.replicated:
        kind = "shards" if weights.sharded else "replicas under DDP"
        raise ValueError(f"weights: expected plain tensors of one process, got {kind}; tangents are not synchronised")
    if len(directions) != len(weights):
        raise ValueError(f"directions: expected {len(weights)}, one a parameter, got {len(directions)}")
    with forward_ad.dual_level(), _plain_operations(weights.model):
        moving = {
            id(p): (p, d.to(p.dtype)) for p, d in zip(weights.parameters, directions, strict=True) if d is not None
        }
        with _in_place_of_parameters(weights.model, moving):
            try:
                value = loss()
                if value.dim() != 0 or not value.requires_grad:
                    raise ValueError("loss: expected a 0-dim tensor that depends on the weights")
                gradients = torch.autograd.grad(value, weights.parameters, allow_unused=True)
            except (NotImplementedError, RuntimeError) as error:
                if not any(sign in str(error) for sign in ("forward AD", "forward mode AD", "jvp")):
                    raise
                raise ValueError(
                    "model: one of its operations has no tangent, so that the exact product cannot be had; use plain "
                    f"attention and no fused kernels, or a difference of gradients ({error})"
                ) from error
            products = [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients]
            return forward_ad.unpack_dual(value).primal.detach(), [None if t is None else t.detach() for t in products]


@contextlib.contextmanager
def _in_place_of_parameters(model: nn.Module, moving: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Every module that holds one of the parameters finds it there with its tangent."""
    duals = {key: forward_ad.make_dual(p, d) for key, (p, d) in moving.items()}
    held: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for module in model.modules():
        own = {k: duals[id(p)] for k, p in module._parameters.items() if id(p) in duals}
        if own and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            p, d = moving[id(module.weight)]
            d = d.clone()
            d[module.padding_idx] = 0  # the row gets no gradient by way of a look-up: it is a constant there
            own["weight"] = forward_ad.make_dual(p, d)
        if own:
            held.append((module, own))
    before = [dict(module._parameters) for module, _ in held]

    def restore(finished: bool) -> None:
        for (module, _), parameters in zip(held, before, strict=True):
            module._parameters.update(parameters)

    with Restoring() as guard:
        guard.on_exit(restore)
        for module, own in held:
            module._parameters.update(own)  # type: ignore[arg-type]
        guard.release()
        yield


class _WithTangents(TorchFunctionMode):
    """Operations whose backward has no tangent in torch, made of ones that have it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.silu or func is torch._C._nn.silu:
            x = args[0] if args else kwargs["input"]
            return x * torch.sigmoid(x)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _plain_operations(model: nn.Module) -> Iterator[None]:
    """No fused attention, nothing compiled, no activation checkpointing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_WithTangents())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            for name in CHECKPOINT_FUNCTIONS:
                if (function := module.__dict__.get(name)) is not None:
                    stack.callback(setattr, module, name, function)
                    setattr(module, name, _directly)
        yield


def _directly(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run(*args, **kwargs)

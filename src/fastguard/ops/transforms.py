"""What torch may do to an op besides calling it: autocast, ``torch.func``, forward mode, second derivatives, DTensors.

The ops have a first derivative in reverse mode, also under ``torch.func.grad``, ``vjp`` and ``vmap`` (which runs them
one sample after the other). Tangents (``torch.func.jvp``, dual tensors) and second derivatives raise: a custom op
without a rule for them would answer 0, or name its own backward in an error that helps nobody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_plain(**tensors: Tensor | None) -> None:
    """Raise a ValueError that names the argument which is sharded over ranks; kernels read local memory."""
    for name, tensor in tensors.items():
        if tensor is not None and hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name}: expected a plain tensor, got a DTensor; gather it first ({name}.full_tensor()), or use a "
                "loss of fastguard.losses on the wrapped model, which gathers the head and shards its gradient"
            )


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matrix product reads ``tensor``: autocast's where it is on, else its own.

    As in torch's own products, autocast leaves float64 alone.
    """
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor.dtype
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def without_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """An op's body in the dtypes it chose: a surrounding autocast would narrow some of its products and not others."""

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        kind = next(a for a in args if isinstance(a, Tensor)).device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return body(*args)
        with torch.autocast(kind, enabled=False):
            return body(*args)

    return run


def under_func() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._are_functorch_transforms_active()


def bind(
    name: str, op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """Register the autograd formula of a custom op; returns the call that ``torch.func`` and forward mode understand.

    Args:
        name: of the op, for errors. op: what ``torch.library.custom_op`` returned.
        setup_context, backward: as ``register_autograd`` takes them.
    """
    op.register_autograd(backward, setup_context=setup_context)
    function = _function(name, op, setup_context, backward)

    def call(*args: Any) -> tuple[Tensor, ...]:
        if forward_ad._current_level >= 0 or under_func():
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{name}: cannot be compiled inside a transform of torch.func; compile without it, or call the "
                    "transform outside of torch.compile"
                )
            return function.apply(*args)  # type: ignore[no-any-return]
        return op._opoverload(*args)  # type: ignore[no-any-return]

    return call


def bind_backward(name: str, op: Any) -> Callable[..., Any]:
    """The call of an op's backward op; where its result is to be differentiated again, that raises and says so."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name}: has no second derivative (create_graph=True, torch.func.hessian); write the loss on explicit "
            "logits or distances where one is needed"
        )

    function = _function(name, op, lambda ctx, inputs, output: None, refuse)

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return function.apply(*args)
        return op._opoverload(*args)

    return call


def _function(
    name: str, op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    generated: Any

    def forward(*args: Any) -> Any:
        return op._opoverload(*args)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            f"{name}: has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors); use reverse mode "
            "(torch.func.grad, vjp), or explicit logits or distances"
        )

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            generated.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    generated = type(f"{name}_function", (torch.autograd.Function,), {k: staticmethod(v) for k, v in methods.items()})
    return generated  # type: ignore[no-any-return]

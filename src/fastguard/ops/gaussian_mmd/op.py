"""``gaussian_mmd``: MMD^2 between each layer's samples and Gaussian noise that is made where it is read.

All distances come from one Gram matrix of the pooled sample ([2B, 2B] per layer): the samples are read once in
the forward and once in the backward, whose gradient is a linear combination of the pooled rows. Noise is remade
from its counters (``ops/philox.py``) and masked features are neither made nor read.

Cost per layer with m unmasked features a sample: 4 B^2 m flops of products, B m noise samples, B m values read;
twice that in the backward, which writes B F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops.gaussian_mmd.reference import BANDWIDTHS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gaussian_mmd(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    seed: int = 0,
    call: Tensor | None = None,
    layer: int = 0,
    sample_offset: int = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """MMD^2 of every layer's samples against standard normal noise (RepNoise, arXiv 2405.14577, noise term).

    Args:
        x: [L, B, F], any strides. F = T * D where a mask is given.
        mask: [B, T] bool or 0/1; each entry covers D features of x and of the noise, 0 sets both to zero.
        seed: of the noise. call: int64, 0-dim, the noise counter (0 if None).
        layer: index of the first layer. sample_offset: global index of the first sample.
        noise: [L, B, F] to use instead of generated noise (no gradient flows into it).

    Returns:
        [L], fp32 (float64 for float64 x). A layer whose rows all coincide, as when all is masked, gives 0 with
        zero gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"x: expected [L, B, F] with B >= 1, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != x.shape[1] or not mask.shape[1] or x.shape[2] % mask.shape[1]:
            raise ValueError(
                f"mask: expected [{x.shape[1]}, T] with T a divisor of {x.shape[2]} features, got {tuple(mask.shape)}"
            )
        if mask.device != x.device:
            raise ValueError(f"mask: expected device {x.device}, got {mask.device}")
        mask = mask != 0
    if noise is not None and (noise.shape != x.shape or noise.device != x.device):
        raise ValueError(f"noise: expected {tuple(x.shape)} on {x.device}, got {tuple(noise.shape)} on {noise.device}")
    if call is None:
        call = torch.zeros((), dtype=torch.int64, device=x.device)
    if call.dim() or call.dtype != torch.int64:
        raise ValueError(f"call: expected a 0-dim int64 tensor, got {call.dtype} {tuple(call.shape)}")
    if sample_offset < 0 or layer < 0:
        name, value = ("sample_offset", sample_offset) if sample_offset < 0 else ("layer", layer)
        raise ValueError(f"{name}: expected 0 or more, got {value}")
    fixed = None if noise is None else noise.detach()
    value, _ = torch.ops.fastguard.gaussian_mmd(x, mask, fixed, call, seed, layer, sample_offset)
    return value  # type: ignore[no-any-return]


def kernel_matrix(gram: Tensor) -> tuple[Tensor, Tensor]:
    """From Gram matrices [L, 2B, 2B]: the MMD^2 [L] and its derivative [L, 2B, 2B] by the squared distances.

    The bandwidth counts as a constant, as published.
    """
    n = gram.shape[-1]
    b = n // 2
    square = gram.diagonal(dim1=-2, dim2=-1)
    d2 = (square[..., :, None] + square[..., None, :] - 2 * gram).clamp_min(0.0)
    d2.diagonal(dim1=-2, dim2=-1).zero_()
    bandwidth = d2.sum((-2, -1), keepdim=True) / (n * n - n) / 4
    # All rows equal: distances over bandwidth tend to no limit, but every kernel value is equal; take distance 0.
    inverse = torch.where(bandwidth > 0, 1 / bandwidth, torch.zeros_like(bandwidth))
    sign = gram.new_full((n, n), -1.0 / (b * b))
    sign[:b, :b] = sign[b:, b:] = 1.0 / (b * b)
    kernel, slope = torch.zeros_like(d2), torch.zeros_like(d2)
    for i in range(BANDWIDTHS):
        rate = inverse / 2**i
        term = torch.exp(-d2 * rate)
        kernel += term
        slope -= term * rate
    return (kernel * sign).sum((-2, -1)), slope * sign


def combination(gram: Tensor, grad: Tensor) -> Tensor:
    """Coefficients [L, B, 2B]: the gradient of sample i is their sum over the pooled rows j, grad [L] included."""
    _, slope = kernel_matrix(gram)
    pull = 2 * (slope + slope.transpose(-2, -1))
    weights = torch.diag_embed(pull.sum(-1)) - pull
    return (weights[:, : gram.shape[-1] // 2] * grad[:, None, None]).contiguous()


@torch.library.custom_op("fastguard::gaussian_mmd", mutates_args=())
def _forward(
    x: Tensor, mask: Tensor | None, noise: Tensor | None, call: Tensor, seed: int, layer: int, sample_offset: int
) -> tuple[Tensor, Tensor]:
    impl = backend.choose("gaussian_mmd", x.device)
    gram = impl.gram(x, mask, noise, call, seed, layer, sample_offset)
    value, _ = kernel_matrix(gram)
    return value, gram


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    x, mask, noise, call, seed, layer, sample_offset
):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    layers, b, _ = x.shape
    return x.new_empty(layers, dtype=wide), x.new_empty(layers, 2 * b, 2 * b, dtype=wide)


@torch.library.custom_op("fastguard::gaussian_mmd_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, noise: Tensor | None, call: Tensor, gram: Tensor,
    seed: int, layer: int, sample_offset: int,
) -> Tensor:  # fmt: skip
    impl = backend.choose("gaussian_mmd", x.device)
    weights = combination(gram, grad.to(gram.dtype))
    return impl.combine(weights, x, mask, noise, call, seed, layer, sample_offset)  # type: ignore[no-any-return]


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, x, mask, noise, call, gram, seed, layer, sample_offset
):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mask, noise, call, *ctx.place = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mask, noise, call, output[1])


def _autograd(ctx: Any, grad: Tensor | None, _gram: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 7
    x, mask, noise, call, gram = ctx.saved_tensors
    dx = torch.ops.fastguard.gaussian_mmd_backward(grad, x, mask, noise, call, gram, *ctx.place)
    return dx, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)

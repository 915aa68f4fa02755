"""``gaussian_mmd``: how far a layer's samples are from Gaussian noise, as one number that has a gradient.

The schema, the fakes and the autograd formula live here, once; the arithmetic lives in the backend modules
beside this file, which expose ``forward`` and ``backward`` with the signatures of ``portable.py``.

Cost, per layer: x is read once in the forward and once in the backward, dx written once; noise is made twice,
B F normals of about 50 integer and float operations each, which outweigh the 2 B^2 F multiply-adds up to B = 16
or so. Tokens that no sample's mask keeps cost nothing. Kept for the backward: x, the mask, a 2B x 2B matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.gaussian_mmd.portable import Source
from fastguard.ops.philox import check_coordinates, seed_int64
from fastguard.ops.precision import DTYPES, accumulation_dtype


def gaussian_mmd(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    seed: int = 0,
    call: Tensor | int | None = None,
    layer: int = 0,
    sample_offset: int = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """Biased MMD^2 between the samples of each layer and standard normal noise, under five Gaussian kernels.

    The noise term of RepNoise (Rosati et al. 2024). Kernel: sum over i = 0..4 of exp(-d2 / (bw 2^i)), where bw is a
    quarter of the mean squared distance among the 2B rows of samples and noise, without gradient. Where every row
    is masked the rows coincide: the result is 0 and so is its gradient.

    Args:
        x: [L, B, F], any strides (no copy is made if features are contiguous); float64, float32, bfloat16, float16.
        mask: [B, T] of bool or 0/1, F a multiple of T; each entry keeps or drops F / T features of a sample and of
            its noise, in every layer. None keeps all.
        seed: any integer, taken mod 2^64.
        call: which draw of the noise, an integer or a 0-dim int64 tensor; required unless ``noise`` is given. **The
            noise is a function of (seed, call, layer, sample): equal arguments mean equal noise.** In a loop raise it
            at every use, or each step compares with the same noise. A tensor's value is copied, so that raising it
            in place between forward and backward is safe, and costs no compilation under ``torch.compile``.
        layer: index of the first layer. sample_offset: global index of the first sample (``fastguard.ops.philox``).
        noise: [L, B, F] to be used instead, in a floating dtype; it gets no gradient.

    Returns:
        [L], fp32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, no samples, a mask that is not 0/1, neither
            ``call`` nor ``noise``, a coordinate of the noise out of range.
        RuntimeError: a forward-mode or a second derivative, which the op does not have.
    """
    _check(x, mask, noise)
    if call is None and noise is None:
        raise ValueError(
            "call: expected an integer or a 0-dim int64 tensor, got None; the noise is a function of (seed, call, "
            "layer, sample), so raise call at each use (call=step), or pass call=0 to compare with one fixed draw"
        )
    if isinstance(call, int):
        call = torch.tensor(call % 2**32, dtype=torch.int64)
    check_coordinates(x.shape[0], x.shape[1], x.shape[2], call, layer, sample_offset)
    fixed = None if noise is None else noise.detach()
    mmd, _, _ = _call_forward(x, mask, fixed, call, seed_int64(seed), layer, sample_offset)
    return mmd


def _check(x: Tensor, mask: Tensor | None, noise: Tensor | None) -> None:
    transforms.check_plain(x=x, mask=mask, noise=noise)
    if x.dim() != 3:
        raise ValueError(f"x: expected [L, B, F], got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a dtype of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
    if mask is not None:
        _, b, features = x.shape
        if mask.dim() != 2 or mask.shape[0] != b:
            raise ValueError(f"mask: expected [{b}, T], got shape {tuple(mask.shape)}")
        if mask.shape[1] == 0 or features % mask.shape[1]:
            raise ValueError(f"mask: expected T to divide the {features} features of x, got T = {mask.shape[1]}")
        if mask.is_complex():
            raise ValueError(f"mask: expected bool or 0/1, got {mask.dtype}")
        if mask.device != x.device:
            raise ValueError(f"mask: expected device {x.device}, got {mask.device}")
    if noise is not None:
        if noise.shape != x.shape or not noise.is_floating_point():
            raise ValueError(
                f"noise: expected a floating dtype and shape {tuple(x.shape)}, got {noise.dtype} {tuple(noise.shape)}"
            )
        if noise.device != x.device:
            raise ValueError(f"noise: expected device {x.device}, got {noise.device}")


def _keep(mask: Tensor | None) -> Tensor | None:
    """The mask as contiguous bool; a ValueError (an assertion on the device) if it holds anything but 0 and 1."""
    if mask is None:
        return None
    keep = mask != 0
    if mask.dtype != torch.bool:
        binary = (mask == keep).all()
        if mask.device.type != "cpu":
            torch._assert_async(binary, "mask: expected bool or 0/1")
        elif not binary:
            raise ValueError("mask: expected bool or 0/1, got other values")
    return keep.contiguous()


def _dense_features(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("fastguard::gaussian_mmd", mutates_args=())
@transforms.without_autocast
def _forward(
    x: Tensor, mask: Tensor | None, noise: Tensor | None, call: Tensor | None, seed: int, layer: int, sample_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    # The call is an output of its own: its value at this forward must outlive the caller's counter.
    counter = torch.zeros((), dtype=torch.int64, device=x.device) if call is None else call.to(x.device, copy=True)
    impl = backend.choose("gaussian_mmd", x.device)
    source = Source(seed, counter, layer, sample_offset, noise)
    mmd, gram = impl.forward(_dense_features(x), _keep(mask), source)
    return mmd, gram, counter


@_forward.register_fake
def _(x, mask, noise, call, seed, layer, sample_offset):  # type: ignore[no-untyped-def]
    layers, b, _ = x.shape
    wide = accumulation_dtype(x.dtype)
    gram = x.new_empty(layers, 2 * b, 2 * b, dtype=wide)
    return x.new_empty(layers, dtype=wide), gram, x.new_empty((), dtype=torch.int64)


@torch.library.custom_op("fastguard::gaussian_mmd_backward", mutates_args=())
@transforms.without_autocast
def _backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    noise: Tensor | None,
    call: Tensor,
    gram: Tensor,
    seed: int,
    layer: int,
    sample_offset: int,
) -> Tensor:
    impl = backend.choose("gaussian_mmd", x.device)
    source = Source(seed, call, layer, sample_offset, noise)
    return impl.backward(grad, _dense_features(x), _keep(mask), source, gram)  # type: ignore[no-any-return]


@_backward.register_fake
def _(grad, x, mask, noise, call, gram, seed, layer, sample_offset):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mask, noise, _, *ctx.coordinates = inputs
    _, gram, call = output
    ctx.mark_non_differentiable(gram, call)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mask, noise, call, gram)


def _autograd(ctx, grad, _gram, _call):  # type: ignore[no-untyped-def]
    dx = None
    if grad is not None and ctx.needs_input_grad[0]:
        dx = _call_backward(grad, *ctx.saved_tensors, *ctx.coordinates)
    return dx, None, None, None, None, None, None


_call_forward = transforms.bind("gaussian_mmd", _forward, _setup_context, _autograd)
_call_backward = transforms.bind_backward("gaussian_mmd", _backward)

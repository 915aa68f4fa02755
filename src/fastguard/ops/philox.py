"""Gaussian noise as a function of its coordinates: Philox4x32-10 counters, Box-Muller normals.

The noise at (seed, call, layer, sample, feature) is the same on every backend, however the batch or the features
are sharded, and can be remade at any time. Sixteen counters make the 64 features of a *block*, four words each:

======== ======================================================================================
key      ``(seed mod 2^32, seed div 2^32)`` of the seed taken mod 2^64
counter  ``(16 * (f div 64) + f mod 16, sample, layer, call mod 2^32)``
word     feature f reads the pair of words (0, 1) if ``(f div 16) mod 4`` is 0 or 1, else (2, 3)
normal   r cos a for ``(f div 16) mod 4`` 0 or 2, r sin a for 1 or 3, with, of the pair (p, q),
         r = sqrt(-2 log(((p >> 9) + 1/2) 2^-23)) and a = 2 pi (q >> 8) 2^-24
======== ======================================================================================

Both uniforms are exact in fp32 (the radius' one is never 0 or 1), so backends share them to the bit and their
normals to 1e-6; the largest is 5.77. float64 noise is float64 arithmetic on the same uniforms. Sixteen lanes
with one word each fill a vector register and a 32-byte sector of bf16, so that kernels need no shuffles.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops.precision import accumulation_dtype

LANES = 16
"""Counters of a block; neighbouring features take neighbouring counters."""

BLOCK = 64
"""Features of a block: LANES counters of four words."""

MAX_FEATURES = 2**34
"""Features that 32 bits of counter can tell apart."""

ROUNDS = 10
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def seed_int64(seed: int) -> int:
    """The int64 that equals a seed mod 2^64, for schemas that know no larger integer."""
    return ((seed + 2**63) & (2**64 - 1)) - 2**63


def philox4x32(counter: Words, seed: int) -> Words:
    """The four output words of each counter: int64 tensors that hold 32-bit words, broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # 64-bit products wrap into the sign; both halves are right all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _normals(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(((p >> 9).double() + 0.5) * 2.0**-23))
    angle = (q >> 8).double() * (2.0 * math.pi * 2.0**-24)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def noise_slice(
    batch: int,
    first: int,
    last: int,
    *,
    seed: int,
    call: Tensor,
    layer: int,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Features first..last-1 of the noise of one layer, [batch, last - first], on the device of ``call``."""
    block, end = first // BLOCK, -(-last // BLOCK)
    group = torch.arange(block * LANES, end * LANES, device=call.device)[None]
    sample = torch.arange(sample_offset, sample_offset + batch, device=call.device)[:, None]
    words = philox4x32((group, sample, torch.full_like(sample, layer), call & MASK), seed)
    lanes = [*_normals(*words[:2]), *_normals(*words[2:])]
    noise = torch.stack([n.to(dtype).view(batch, end - block, LANES) for n in lanes], dim=2)
    return noise.view(batch, -1)[:, first - block * BLOCK : last - block * BLOCK]


def gaussian_noise(
    batch: int,
    features: int,
    *,
    seed: int = 0,
    call: Tensor | None = None,
    layer: int = 0,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The standard normal noise [batch, features] that ``gaussian_mmd`` compares a layer's samples with.

    Args:
        batch, features: samples and features per sample; features at most ``MAX_FEATURES``.
        seed: any integer, taken mod 2^64. call: 0-dim int64 tensor, the call counter, taken mod 2^32; None is 0.
        layer: index of the layer. sample_offset: global index of the first sample. Both below 2^32.
        dtype: float64, float32, or a half type (fp32 noise, rounded).
        device: None for that of ``call`` (the CPU without one).

    Raises:
        ValueError: a coordinate outside its range.
    """
    check_coordinates(1, batch, features, call, layer, sample_offset)
    counter = torch.zeros((), dtype=torch.int64, device=device) if call is None else call
    counter = counter if device is None else counter.to(device)
    wide = accumulation_dtype(dtype)
    if counter.device.type == "cpu" and backend.backend_name("gaussian_noise", counter.device) == "cpu":
        noise = torch.empty(batch, features, dtype=wide)
        torch.ops.fastguard_c.gaussian_noise(seed_int64(seed), int(counter), layer, sample_offset, noise)
        return noise.to(dtype)
    return noise_slice(
        batch, 0, features, seed=seed, call=counter, layer=layer, sample_offset=sample_offset, dtype=wide
    ).to(dtype)


def check_coordinates(
    layers: int, batch: int, features: int, call: Tensor | None, layer: int, sample_offset: int
) -> None:
    """Raise a ValueError that names the coordinate outside its range."""
    if features > MAX_FEATURES:
        raise ValueError(f"features: expected at most {MAX_FEATURES} per sample, got {features}")
    if call is not None and (call.dtype != torch.int64 or call.dim() != 0):
        raise ValueError(f"call: expected a 0-dim int64 tensor or None, got {call.dtype} {tuple(call.shape)}")
    if layer < 0 or layer + layers > 2**32:
        raise ValueError(f"layer: expected layers within 0 .. 2^32 - 1, got {layer} and {layers} layers")
    if sample_offset < 0 or sample_offset + batch > 2**32:
        raise ValueError(
            f"sample_offset: expected samples within 0 .. 2^32 - 1, got {sample_offset} and {batch} samples"
        )

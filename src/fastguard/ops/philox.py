"""Gaussian noise as a function of where it is used: counter-based, never stored, the same however it is sharded.

Generator: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

* key: the low and the high 32 bits of ``seed``;
* counter: word 0 is f // 4 for feature f of the sample, word 1 the global index of the sample, word 2 the
  layer, word 3 the low 32 bits of ``call``;
* the four output words a, b, c, d make features 4k .. 4k+3: (a, b) the first two, (c, d) the last two.

A pair of words becomes a pair of normals by Box-Muller: u = ((a >> 9) + 1/2) / 2^23 and v likewise from b, both
exact in fp32 and inside (0, 1); the normals are sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v), so
none exceeds 5.77. float64 noise applies float64 functions to the same u and v: it agrees with fp32 to 1e-6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _high_and_low(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of 32-bit words held in int64, without passing 2^63."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on broadcastable int64 counters of 32-bit words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _high_and_low(c0, _MULTIPLIERS[0])
        high1, low1 = _high_and_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _box_muller(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    u, v = (((w >> 9).to(dtype) + 0.5) * 2.0**-23 for w in (a, b))
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
    return radius * torch.cos(angle), radius * torch.sin(angle)


def gaussian_noise(
    samples: int,
    features: int,
    *,
    seed: int,
    call: Tensor,
    layer: int,
    sample_offset: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals [samples, features] of one layer, on the device of ``call``.

    Args:
        seed, layer: of the noise. call: int64, 0-dim, the noise counter.
        sample_offset: global index of the first sample. first: index of the first feature.
        dtype: float32 or float64; other dtypes are rounded from float32.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    device = call.device
    blocks = torch.arange(first // 4, (first + features + 3) // 4, device=device)
    sample = torch.arange(sample_offset, sample_offset + samples, device=device)[:, None]
    words = philox((blocks[None] & _LOW, sample & _LOW, torch.full_like(sample, layer), call & _LOW), seed)
    normals = (*_box_muller(words[0], words[1], wide), *_box_muller(words[2], words[3], wide))
    flat = torch.stack(normals, dim=-1).reshape(samples, -1)
    return flat[:, first % 4 : first % 4 + features].to(dtype)

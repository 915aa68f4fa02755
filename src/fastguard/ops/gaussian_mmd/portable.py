"""``gaussian_mmd`` in plain PyTorch: Gram matrices by blocks of features, noise remade in each.

Shapes: L layers, B samples, F features, T mask entries, R = 2B rows (the samples, then their noise).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard.ops.gaussian_mmd.reference import KERNELS
from fastguard.ops.philox import noise_slice
from fastguard.ops.precision import accumulation_dtype

BLOCK_ELEMENTS = 2**17
"""Most noise elements alive at a time: 1 MB as int64."""


class Source(NamedTuple):
    """Where the noise comes from: counters, or the explicit tensor [L, B, F]."""

    seed: int
    call: Tensor
    layer: int
    sample_offset: int
    explicit: Tensor | None


def distances(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances [L, R, R] of rows from their inner products, and 1 / bandwidth [L, 1, 1].

    The difference n_i + n_j - 2 g_ij cancels where rows lie close together, but a kernel sees it over the
    bandwidth, and noise is nearly orthogonal to any sample: a row of squared norm n adds about n to its distance
    from each of B rows, so the bandwidth is at least n / 8B and the error of the ratio at most some 16 B roundings.
    """
    norm = gram.diagonal(dim1=1, dim2=2)
    d2 = (norm[:, :, None] + norm[:, None] - 2 * gram).clamp_min(0)
    rows = gram.shape[1]
    bandwidth = d2.sum((1, 2), keepdim=True) / (rows * rows - rows) / 4
    live = bandwidth >= torch.finfo(gram.dtype).tiny
    return d2, torch.where(live, 1 / bandwidth, 0)


def mmd_of(gram: Tensor) -> Tensor:
    """MMD^2 [L] from the inner products of the rows, [L, R, R]."""
    d2, inverse = distances(gram)
    b = gram.shape[1] // 2
    k = kernel_sum(d2 * inverse)
    return (k[:, :b, :b] + k[:, b:, b:] - k[:, :b, b:] - k[:, b:, :b]).sum((1, 2)) / b**2


def kernel_sum(ratio: Tensor, weighted: bool = False) -> Tensor:
    """Sum over i of exp(-ratio / 2^i), each divided by 2^i if ``weighted``: minus its derivative."""
    total = torch.zeros_like(ratio)
    for i in range(KERNELS):
        total += torch.exp(ratio * -(2.0**-i)) * (2.0**-i if weighted else 1.0)
    return total


def coefficients(gram: Tensor, grad: Tensor) -> Tensor:
    """[L, B, R] such that the gradient of sample i is sum_j c_ij row_j, for upstream gradients grad [L].

    With s = -dk/d(d2): c_ij = (4 g / B^2) s(x_i, x_j) towards samples j != i, -(4 g / B^2) s(x_i, z_j) towards
    noise, and what makes each row sum to zero towards the sample itself.
    """
    d2, inverse = distances(gram)
    b = gram.shape[1] // 2
    c = kernel_sum((d2 * inverse)[:, :b], weighted=True) * inverse * (4 * grad[:, None, None] / b**2)
    c[:, :, b:].neg_()
    itself = c.diagonal(dim1=1, dim2=2)
    itself.zero_().copy_(-c.sum(2))
    return c


def segments(mask: Tensor | None, features: int, block: int) -> list[tuple[int, int]]:
    """Ranges of at most ``block`` features that cover every token which counts in any sample, and no other."""
    if mask is None:
        runs = [(0, features)]
    else:
        width = features // mask.shape[1]
        edge = torch.nn.functional.pad(mask.any(0).to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
        runs = [(a * width, b * width) for a, b in zip(edge[::2], edge[1::2], strict=True)]
    return [(at, min(at + block, stop)) for start, stop in runs for at in range(start, stop, block)]


def rows_of(x: Tensor, mask: Tensor | None, source: Source) -> Iterator[tuple[int, slice, Tensor | None, Tensor]]:
    """(layer index, features, mask of the samples there, masked rows [R, features]) for every live block."""
    layers, b, features = x.shape
    wide = accumulation_dtype(x.dtype)
    block = max(64, BLOCK_ELEMENTS // b // 64 * 64)
    for first, last in segments(mask, features, block):
        here = slice(first, last)
        weight = None
        if mask is not None:
            token = torch.arange(first, last, device=x.device) // (features // mask.shape[1])
            weight = mask[:, token]
        for i in range(layers):
            if source.explicit is None:
                z = noise_slice(
                    b, first, last, seed=source.seed, call=source.call, layer=source.layer + i,
                    sample_offset=source.sample_offset, dtype=wide,
                )  # fmt: skip
            else:
                z = source.explicit[i, :, here]
            rows = torch.cat([x[i, :, here].to(wide), z.to(wide)])
            if weight is not None:
                # Not a product: what lies under the mask may be anything, infinities included.
                rows = torch.where(weight.repeat(2, 1), rows, 0)
            yield i, here, weight, rows


def forward(x: Tensor, mask: Tensor | None, source: Source) -> tuple[Tensor, Tensor]:
    """MMD^2 [L] of x [L, B, F] under mask [B, T] (bool), and the rows' inner products [L, R, R]; fp32 or float64."""
    layers, b, _ = x.shape
    wide = accumulation_dtype(x.dtype)
    gram = torch.zeros(layers, 2 * b, 2 * b, dtype=wide, device=x.device)
    for i, _, _, rows in rows_of(x, mask, source):
        gram[i].addmm_(rows, rows.T)
    return mmd_of(gram), gram


def backward(grad: Tensor, x: Tensor, mask: Tensor | None, source: Source, gram: Tensor) -> Tensor:
    """dx [L, B, F], contiguous, in the dtype of x."""
    c = coefficients(gram, grad)
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for i, here, weight, rows in rows_of(x, mask, source):
        d = c[i] @ rows
        dx[i, :, here] = d if weight is None else torch.where(weight, d, 0)
    return dx

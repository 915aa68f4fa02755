"""``head_kl`` on CPU: the tile loop of ``portable.py`` with csrc/cpu/head_kl.cpp between the products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastguard import _extension
from fastguard.ops.head_kl import portable
from fastguard.ops.head_kl.portable import Row
from fastguard.ops.vocabulary import Head


class CppKernels:
    """`TileKernels` in C++."""

    def statistics(self, z: Tensor, d: Tensor, head: Head) -> Row:
        """See `TileKernels.statistics`."""
        out = torch.empty(3, z.shape[0], dtype=z.dtype)
        torch.ops.fastguard_c.head_kl_statistics(z, d, head.bias, head.scale, head.softcap or 0.0, out)
        return Row(*out)

    def gradient(self, z: Tensor, d: Tensor, head: Head, lse: Tensor, gap: Tensor, grad: Tensor, ready: bool) -> None:
        """See `TileKernels.gradient`."""
        row = torch.stack([lse, gap, grad])
        torch.ops.fastguard_c.head_kl_gradient(z, d, head.bias, head.scale, head.softcap or 0.0, row, ready)


_extension.load()
forward = functools.partial(portable.forward, kernels=CppKernels())
backward = functools.partial(portable.backward, kernels=CppKernels())

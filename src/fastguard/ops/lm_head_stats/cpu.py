"""``lm_head_stats`` on CPU: the tile loop of ``portable.py`` with csrc/cpu/lm_head_stats.cpp between the products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastguard import _extension
from fastguard.ops.lm_head_stats import exact, live, portable
from fastguard.ops.lm_head_stats.op import Grads, Row, Saved
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head


class CppKernels:
    """`TileKernels` in C++; half-precision logits are widened to fp32 first, a tile at a time."""

    def statistics(
        self, z: Tensor, head: Head, target: Tensor, filter_tol: float, with_mean: bool, columns: Tensor | None
    ) -> Row:
        """See `TileKernels.statistics`."""
        wide = accumulation_dtype(z.dtype)
        out = torch.empty(4, z.shape[0], dtype=wide)
        torch.ops.fastguard_c.lm_head_statistics(
            z.to(wide), _as(head.bias, wide), target.contiguous(), head.scale, head.softcap or 0.0, filter_tol,
            with_mean, columns, out,
        )  # fmt: skip
        return Row(*out)

    def columns(self, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, int, Tensor | None]:
        """See `TileKernels.columns`."""
        most = int(portable.DENSE * codes.numel())
        index, share = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=dtype)
        counts = torch.zeros(2, dtype=torch.int64)
        torch.ops.fastguard_c.lm_head_columns(codes, live.COVERAGE, live.WARM, index, share, counts)
        n_live, n_warm = counts.tolist()
        if n_live + n_warm > most:
            return None, codes.numel(), None
        return index[: n_live + n_warm], n_live, share[:n_warm] if n_warm else None

    def gradient(
        self, z: Tensor, head: Head, index: Tensor | None, target: Tensor, row: Saved, grads: Grads, out: Tensor
    ) -> Tensor:
        """See `TileKernels.gradient`."""
        wide = accumulation_dtype(z.dtype)
        logits = out.copy_(z) if z.dtype == wide else z.to(wide)
        tail = torch.empty(z.shape[0], dtype=wide)
        stats = torch.stack([row.lse, row.rest_lse, row.lse if row.mean_logit is None else row.mean_logit])
        torch.ops.fastguard_c.lm_head_gradient(
            logits, _as(head.bias, wide), index, target.contiguous(), head.scale, head.softcap or 0.0, stats, *grads,
            tail,
        )  # fmt: skip
        if logits is not out:
            out.copy_(logits)
        return tail


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


_extension.load()
forward = functools.partial(portable.forward, kernels=CppKernels())
backward = functools.partial(portable.backward, kernels=CppKernels())
keep = functools.partial(exact.forward, kernels=CppKernels())
read_kept = functools.partial(exact.backward, kernels=CppKernels())

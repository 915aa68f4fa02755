"""The noise term of Representation Noising over the samples of all data ranks, as on an undivided batch.

MMD compares every sample with every other, so that it is no mean over ranks; of one sample a rank it is a constant. So
each rank gathers the samples of one layer, computes the term of all of them and its gradient, and keeps that of its own
samples: what is gathered lives no longer than the layer's tap. Per layer: one all-gather, and on every rank the
arithmetic of the undivided term, 8 (R B)^2 F flops forward for R ranks of B samples of F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastguard.ops.gaussian_mmd import gaussian_mmd
from fastguard.over_ranks import gathered
from fastguard.ranks import DataRanks


class Gathered:
    """The batches of all data ranks, padded to one length, in the order of the ranks.

    Args:
        mask: [B, T] bool, the tokens of this rank's samples that count; B and T may differ from rank to rank.
        ranks: the data ranks. All of them construct it, and call `mmd` for the same layers in the same order.

    Attributes:
        before: samples of the ranks before this one.
    """

    def __init__(self, mask: Tensor, ranks: DataRanks) -> None:
        self.ranks, self.own = ranks, mask.shape
        shapes = gathered(list(mask.shape), ranks)
        self.sizes, self.longest = [shape[0] for shape in shapes], max(shape[1] for shape in shapes)
        self.before = sum(self.sizes[: ranks.rank])
        self.mask = self._every(mask.to(torch.uint8)[..., None])[..., 0] != 0

    def mmd(self, samples: Tensor, *, sample_offset: int, **noise: Any) -> Tensor:
        """``gaussian_mmd`` of all ranks' samples, 0-dim, from this rank's ``samples`` [B, T * D].

        sample_offset: of this rank's first sample. noise: ``seed``, ``call`` and ``layer``.
        """
        value: Tensor = _MMD.apply(samples, self, {"sample_offset": sample_offset - self.before, **noise})
        return value

    def whole(self, samples: Tensor) -> Tensor:
        """[1, sum of B, T * D], padded with zeros."""
        return self._every(samples.detach().unflatten(1, (self.own[1], -1))).flatten(1)[None]

    def _every(self, x: Tensor) -> Tensor:
        """All ranks' [B, T, D] as one."""
        room = (0, 0, 0, self.longest - x.shape[1], 0, max(self.sizes) - x.shape[0])
        padded = nn.functional.pad(x, room).contiguous()
        every = [torch.empty_like(padded) for _ in self.sizes]
        torch.distributed.all_gather(every, padded, group=self.ranks.group)
        return torch.cat([part[:size] for part, size in zip(every, self.sizes, strict=True)])


class _MMD(torch.autograd.Function):
    """The term, whose gradient is made with it, while what was gathered is there."""

    @staticmethod
    def forward(ctx: Any, samples: Tensor, every: Gathered, noise: dict[str, Any]) -> Tensor:
        whole = every.whole(samples)
        if not ctx.needs_input_grad[0]:
            return gaussian_mmd(whole, every.mask, **noise)[0]
        with torch.enable_grad():
            value = gaussian_mmd(whole.requires_grad_(), every.mask, **noise)[0]
        (grad,) = torch.autograd.grad(value, whole)
        rows, length = every.own
        own = grad[0, every.before : every.before + rows].view(rows, every.longest, -1)[:, :length]
        ctx.save_for_backward(own.reshape(samples.shape) * every.ranks.divisor)  # which the engine takes back
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (own,) = ctx.saved_tensors
        return own * grads[0].to(own.dtype), None, None

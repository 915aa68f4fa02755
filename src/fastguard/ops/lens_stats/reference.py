"""The specification of ``lens_stats``: gather, norm, then the specification of ``lm_head_stats``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats import reference as head
from fastguard.ops.vocabulary import Norm


def final_norm(x: Tensor, norm: Norm) -> Tensor:
    """The final norm of a model as its own module computes it."""
    if norm.kind == "none":
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    unit = wide / (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        unit = unit * (1 + norm.weight if norm.kind == "rms_offset" else norm.weight)
    if norm.bias is not None:
        unit = unit + norm.bias
    return unit.to(x.dtype)


def lens_stats(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    target: Tensor,
    norm_kind: str = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse, rest_lse, target_logit, mean_logit), each [N], of head(final_norm(hidden[rows])).

    hidden: [..., D], read as [M, D]; rows: [N] indices into M.
    """
    norm = Norm(norm_kind, norm_weight, norm_bias, norm_eps)
    x = final_norm(hidden.reshape(-1, hidden.shape[-1])[rows], norm)
    return head.lm_head_stats(x, weight, target, bias, scale, softcap)

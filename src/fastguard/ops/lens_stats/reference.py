"""The specification of ``lens_stats``: gather, norm, then the specification of ``lm_head_stats``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats import reference as head


def final_norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The final norm of a model as its own module computes it: ``none``, ``rms``, ``rms_offset`` or ``layer``."""
    if kind == "none":
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    unit = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        unit = unit * (1 + weight if kind == "rms_offset" else weight)
    if bias is not None:
        unit = unit + bias
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
    x = final_norm(hidden.reshape(-1, hidden.shape[-1])[rows], norm_kind, norm_weight, norm_bias, norm_eps)
    return head.lm_head_stats(x, weight, target, bias, scale, softcap)

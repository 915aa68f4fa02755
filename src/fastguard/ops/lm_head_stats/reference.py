"""The specification of ``lm_head_stats``: plain PyTorch, all logits at once.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.vocabulary import Head


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Logits [N, V]: ``scale * (hidden @ weight.T + bias)``, soft-capped to ``cap * tanh(z / cap)``."""
    z = hidden @ head.weight.T
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    if head.softcap:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z


def lm_head_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse, rest_lse, target_logit, mean_logit), each [N]; rows with a negative target are 0 and carry no gradient.

    rest_lse is the log-sum-exp over every token but the target; mean_logit the mean under the softmax.
    """
    live = target >= 0
    z = logits_of(hidden, Head(weight, bias, scale, softcap))
    # Half-precision logits are reduced in fp32, as torch's own cross-entropy reduces them.
    z = z if z.dtype == torch.float64 else z.float()
    safe = torch.where(live, target, 0)
    lse = torch.logsumexp(z, dim=-1)
    is_target = torch.zeros_like(z, dtype=torch.bool).scatter_(1, safe[:, None], True)
    rest_lse = torch.logsumexp(z.masked_fill(is_target, float("-inf")), dim=-1)
    target_logit = z.gather(1, safe[:, None])[:, 0]
    mean_logit = (torch.softmax(z, dim=-1) * z).sum(-1)
    stats = (lse, rest_lse, target_logit, mean_logit)
    return tuple(torch.where(live, s, torch.zeros_like(s)) for s in stats)  # type: ignore[return-value]

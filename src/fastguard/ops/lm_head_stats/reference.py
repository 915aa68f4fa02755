"""The specification of ``lm_head_stats``: plain PyTorch, all logits at once.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats import live
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


def one_pass_codes(
    z: Tensor, target: Tensor, bound: Tensor, filter_tol: float, parts: int, block: int = 128, rounding: float = 1.0
) -> Tensor:
    """Column codes [V] of a tile as a scan that reads the columns once finds them (``triton/``), without mean_logit.

    z: logits [R, V]. bound: [R], a lower bound of the rest lse to start from. parts: how many runs of blocks of
    ``block`` columns start from it. rounding: what the sums of dropped mass keep of the true ones.
    """
    rest = z.scatter(1, target[:, None], float("-inf"))
    v, lse = z.shape[1], rest.logsumexp(1)
    blocks = torch.nn.functional.pad(rest, (0, -v % (2 * block)), value=float("-inf")).unflatten(1, (-1, block))
    run = 2 * -(-blocks.shape[1] // 2 // parts)
    sums = blocks.logsumexp(2)
    known = torch.cat([s.logcumsumexp(1) for s in sums.split(run, 1)], 1).maximum(bound[:, None])
    peak = torch.exp(blocks - known[:, :, None]).amax(0).flatten()[:v].float()
    codes = ((peak.view(torch.int32) + (1 << 20)) >> 21) - 127 * live.CODES_PER_OCTAVE + 254
    codes = codes.clamp(0, 254)
    octaves = torch.exp2((codes.double() - 254) / live.CODES_PER_OCTAVE)
    least = live.threshold(torch.exp(rest - lse[:, None]).double(), octaves, filter_tol * rounding)
    codes[octaves >= least] = live.LIVE
    codes[target] = live.LIVE
    return codes.to(torch.uint8)

"""The specification of ``head_kl``: plain PyTorch, both models' logits at once.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.lm_head_stats.reference import logits_of
from fastguard.ops.vocabulary import Head


def head_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) of each row [N]: the mean, under the teacher, of log p_teacher - log p_student."""
    with torch.no_grad():
        zt = logits_of(teacher, Head(weight if teacher_weight is None else teacher_weight, bias, scale, softcap))
    zs = logits_of(student, Head(weight, bias, scale, softcap))
    # Half-precision logits are reduced in fp32, as torch's own losses reduce them.
    zs, zt = (z if z.dtype == torch.float64 else z.float() for z in (zs, zt))
    log_s, log_t = torch.log_softmax(zs / temperature, -1), torch.log_softmax(zt / temperature, -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)

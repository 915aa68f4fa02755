"""KL divergence of every row of a student's predictions from a teacher's, without N x V logits."""

from fastguard.ops.head_kl.op import head_kl

__all__ = ["head_kl"]

"""Cross-entropy of a linear head without its logits."""

from fastguard.ops.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]

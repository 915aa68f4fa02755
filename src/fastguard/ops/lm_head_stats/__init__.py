"""Log-sum-exp, rest log-sum-exp, target and mean logit of every row, without N x V logits."""

from fastguard.ops.lm_head_stats.op import LMHeadStats, lm_head_stats

__all__ = ["LMHeadStats", "lm_head_stats"]

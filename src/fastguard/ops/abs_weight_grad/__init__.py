"""Sums over samples of what each one's weight gradient is in magnitude, squared and signed: SNIP and Fisher scores."""

from fastguard.ops.abs_weight_grad.op import abs_weight_grad_

__all__ = ["abs_weight_grad_"]

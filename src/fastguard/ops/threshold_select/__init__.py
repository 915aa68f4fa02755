"""Which entries of many tensors are the k largest, exactly, without a sort."""

from fastguard.ops.threshold_select.op import Selected, threshold_select

__all__ = ["Selected", "threshold_select"]

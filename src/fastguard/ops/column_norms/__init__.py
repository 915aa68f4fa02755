"""Streaming sums of squares of the features of activations."""

from fastguard.ops.column_norms.op import column_norms_

__all__ = ["column_norms_"]

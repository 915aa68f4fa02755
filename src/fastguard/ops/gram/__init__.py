"""Streaming Gram matrices of activations."""

from fastguard.ops.gram.op import gram_

__all__ = ["gram_"]

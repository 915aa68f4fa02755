"""The vocabulary lens: gather rows of an un-normed hidden state, apply the final norm and read the head."""

from fastguard.ops.lens_stats.op import lens_stats

__all__ = ["lens_stats"]

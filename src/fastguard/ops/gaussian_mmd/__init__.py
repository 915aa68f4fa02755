"""Multi-bandwidth MMD between samples and counter-based Gaussian noise."""

from fastguard.ops.gaussian_mmd.op import gaussian_mmd

__all__ = ["gaussian_mmd"]

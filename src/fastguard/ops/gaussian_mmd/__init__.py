"""Multi-bandwidth MMD^2 between samples and counter-based Gaussian noise, without noise or differences in memory."""

from fastguard.ops.gaussian_mmd.op import gaussian_mmd

__all__ = ["gaussian_mmd"]

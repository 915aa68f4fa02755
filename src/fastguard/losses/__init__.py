"""Losses that users swap in: nn.Modules that place taps in a model and combine what the taps found."""

from fastguard.losses.repnoise import RepNoiseLoss

__all__ = ["RepNoiseLoss"]

"""Losses that users swap in: they place taps in a model and combine what the taps found."""

from fastguard.losses.circuit_breaker import CircuitBreakerLoss
from fastguard.losses.language_model import LanguageModelLoss, dpo_loss
from fastguard.losses.probe_projection import ProbeProjectionLoss
from fastguard.losses.repnoise import RepNoiseLoss

__all__ = ["CircuitBreakerLoss", "LanguageModelLoss", "ProbeProjectionLoss", "RepNoiseLoss", "dpo_loss"]

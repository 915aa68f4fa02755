"""The numbers of an AdamW step, made once in double precision for all backends."""

from __future__ import annotations

from typing import NamedTuple


class AdamW(NamedTuple):
    """With m and v updated: p <- decay p - step_size m / (sqrt(v) / root_correction + eps)."""

    decay: float  # 1 - lr * weight_decay
    mean_weight: float  # 1 - beta1
    square_keep: float  # beta2
    square_weight: float  # 1 - beta2
    step_size: float  # lr / (1 - beta1^step)
    root_correction: float  # sqrt(1 - beta2^step)
    eps: float

    @classmethod
    def at(cls, step: int, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> AdamW:
        """The numbers of step ``step``, counted from 1."""
        return cls(
            decay=1 - lr * weight_decay,
            mean_weight=1 - beta1,
            square_keep=beta2,
            square_weight=1 - beta2,
            step_size=lr / (1 - beta1**step),
            root_correction=(1 - beta2**step) ** 0.5,
            eps=eps,
        )

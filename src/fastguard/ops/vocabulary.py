"""What the ops that read a vocabulary share: the head, the final norm before it, and the checks of both.

``lm_head_stats`` is the family's op: its schema has a final norm, a choice of rows and a gradient token, all absent by
default. ``lens_stats`` is the same op with them, ``linear_cross_entropy`` arithmetic on its statistics; ``head_kl`` has
kernels of its own. Schemas are flat, as torch wants them; all else passes bundles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastguard.ops import transforms
from fastguard.ops.precision import DTYPES

KINDS = ("none", "rms", "rms_offset", "layer")
"""Kinds of final norm; see ``final_norm``."""

REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True, eq=False)
class Head:
    """Logits [N, V] of rows x [N, D]: z = scale * (x @ weight.T + bias), then softcap * tanh(z / softcap).

    weight: [V, D]. bias: [V] or None. softcap: None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """The norm between a hidden state and the head; ``Norm()`` is none.

    kind: one of ``KINDS``. weight, bias: [D] or None.

    Raises:
        ValueError: an unknown kind.
    """

    kind: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"norm_kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")


def check_head(head: Head, x: Tensor, name: str, /, **others: Tensor | None) -> None:
    """Raise a ValueError that names what does not fit of a head and the rows x [..., D] that it reads.

    Args:
        head: as the caller gave it; its dtype may differ from that of x: what products are taken in is the op's matter.
        name: the argument that x is.
        others: further tensors of the call, by name: plain, and on the device of x.
    """
    floating = {name: x, "weight": head.weight, "bias": head.bias}
    transforms.check_plain(**floating, **others)
    for key, tensor in floating.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{key}: expected a dtype of {', '.join(map(str, DTYPES))}, got {tensor.dtype}"
                + ("" if tensor.is_floating_point() else "; a quantised tensor is to be dequantised first")
            )
    weight, bias, softcap = head.weight, head.bias, head.softcap
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected [V, {x.shape[-1]}], got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    check_device(x, weight=weight, bias=bias, **others)


def check_device(x: Tensor, /, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the tensor which is not on the device of x."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {tensor.device}")


def check_reduction(reduction: str) -> None:
    """Raise a ValueError for a ``reduction`` that torch's losses do not know either."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")

"""``class_moments_``: running means of activations by class and position, to the precision of a pair of numbers.

Checks and the schema live here, once; the arithmetic lives in the backend modules beside this file, which expose
``update`` with the signature of ``portable.py``.

Cost: what is read of x, B P D elements, and the state read and written, 4 C P D numbers (8 with the second moment), a
call. No activation is kept, and none but the named positions is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.precision import DTYPES


@torch.no_grad()
def class_moments_(
    count: Tensor,
    mean: Tensor,
    mean_rest: Tensor | None,
    x: Tensor,
    label: Tensor,
    *,
    positions: Sequence[int] | Tensor | None = None,
    second: Tensor | None = None,
    second_rest: Tensor | None = None,
) -> None:
    """Take a batch of activations into the running moments of each class at each position, in place.

    What a difference in means (Arditi et al. 2024) is made of: one call a layer and batch, with
    ``positions=range(-5, 0)``, on states of shape [layers, ...] by ``count[l], mean[l], mean_rest[l]``. States begin
    as zeros. A number is kept as an fp32 and what its rounding left, 48 bits in all, and sums are float64 within a
    batch, so that a million samples lose nothing that fp32 could show. Records no gradient.

    Args:
        count: [C] int64, samples of each class so far; written.
        mean: [C, P, D] fp32, or float64 where x is; written. The first moment of each class, position and feature.
        mean_rest: of the shape and dtype of mean, what mean's rounding left; written. None in float64.
        x: [B, T, D], any strides (no copy is made if features are contiguous); float64, float32, bfloat16 or float16.
        label: [B] integers, the class of each sample; -1 leaves it out.
        positions: P tokens, from the end where negative, the same for each sample (left padding); or integers [B, P],
            each sample's own (right padding). None: all T of them.
        second: as mean; written. The sum of squared distances from the mean, which over count - 1 is the variance.
        second_rest: as mean_rest, of second.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, a label or position out of range, a rest
            that is missing or too many.
    """
    transforms.check_plain(count=count, mean=mean, mean_rest=mean_rest, x=x, label=label, second=second)
    _check(count, mean, mean_rest, x, label, second, second_rest)
    at = _positions(positions, x, mean.shape[1])
    _update._opoverload(count, mean, mean_rest, second, second_rest, x, label, at)


def _check(
    count: Tensor,
    mean: Tensor,
    mean_rest: Tensor | None,
    x: Tensor,
    label: Tensor,
    second: Tensor | None,
    second_rest: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x: expected [B, T, D], got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a dtype of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if label.dtype not in (torch.int64, torch.int32) or label.shape != x.shape[:1]:
        raise ValueError(f"label: expected integers [{x.shape[0]}], got {label.dtype} {tuple(label.shape)}")
    if count.dtype != torch.int64 or count.dim() != 1 or count.shape[0] == 0:
        raise ValueError(f"count: expected int64 [C], got {count.dtype} {tuple(count.shape)}")
    if mean.dim() != 3 or mean.shape[0] != count.shape[0] or mean.shape[2] != x.shape[2]:
        raise ValueError(f"mean: expected [{count.shape[0]}, P, {x.shape[2]}], got shape {tuple(mean.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else mean.dtype
    if mean.dtype != wide or mean.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"mean: expected float32, or float64 (x of {x.dtype}), got {mean.dtype}")
    rested = mean.dtype == torch.float32
    states = {"mean": mean, "mean_rest": mean_rest, "second": second, "second_rest": second_rest}
    for name, of in (("mean_rest", mean), ("second_rest", second)):
        if (states[name] is not None) != (rested and of is not None):
            expected = "a tensor beside an fp32 state" if rested and of is not None else "None"
            raise ValueError(f"{name}: expected {expected}, got {'None' if states[name] is None else 'a tensor'}")
    for name, tensor in states.items():
        if tensor is None:
            continue
        if tensor.shape != mean.shape or tensor.dtype != mean.dtype:
            raise ValueError(
                f"{name}: expected {mean.dtype} {tuple(mean.shape)} as mean, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {tensor.stride()}")
    if not count.is_contiguous():
        raise ValueError(f"count: expected contiguous memory, got strides {count.stride()}")
    for name, tensor in {"count": count, "label": label, **states}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {tensor.device}")


def _positions(positions: Sequence[int] | Tensor | None, x: Tensor, places: int) -> Tensor:
    """[P] or [B, P] int64 on the device of x; what a host knows is checked."""
    samples, tokens, _ = x.shape
    if isinstance(positions, Tensor):
        if positions.dtype not in (torch.int64, torch.int32) or positions.shape != (samples, places):
            raise ValueError(
                f"positions: expected integers [{samples}, {places}], got {positions.dtype} {tuple(positions.shape)}"
            )
        if positions.device != x.device:
            raise ValueError(f"positions: expected device {x.device}, got {positions.device}")
        return positions.long()
    named = list(range(tokens)) if positions is None else list(positions)
    if len(named) != places:
        raise ValueError(f"positions: expected {places}, as many as mean has, got {len(named)}")
    for p in named:
        if not -tokens <= p < tokens:
            raise ValueError(f"positions: expected one of the {tokens} tokens of x, got {p}")
    return torch.tensor(named, dtype=torch.int64, device=x.device)


def _check_values(label: Tensor, positions: Tensor, classes: int, tokens: int) -> None:
    """Raise a ValueError (an assertion on the device) if a label or a position is out of range."""
    for name, values, low, high in (("label", label, -1, classes), ("positions", positions, -tokens, tokens)):
        if values.numel() == 0:
            continue
        fits = ((values >= low) & (values < high)).all()
        if values.device.type != "cpu":
            torch._assert_async(fits, f"{name}: expected {low} to {high - 1}")
        elif not fits:
            raise ValueError(f"{name}: expected {low} to {high - 1}, got {int(values.min())} to {int(values.max())}")


@torch.library.custom_op(
    "fastguard::class_moments_", mutates_args=("count", "mean", "mean_rest", "second", "second_rest")
)
@transforms.without_autocast
def _update(
    count: Tensor,
    mean: Tensor,
    mean_rest: Tensor | None,
    second: Tensor | None,
    second_rest: Tensor | None,
    x: Tensor,
    label: Tensor,
    positions: Tensor,
) -> None:
    _check_values(label, positions, count.shape[0], x.shape[1])
    if x.numel() == 0 or positions.numel() == 0:
        return
    impl = backend.choose("class_moments", x.device)
    dense = x if x.stride(2) == 1 else x.contiguous()
    impl.update(count, mean, mean_rest, second, second_rest, dense, label.long().contiguous(), positions.contiguous())


@_update.register_fake
def _(count, mean, mean_rest, second, second_rest, x, label, positions):  # type: ignore[no-untyped-def]
    return None

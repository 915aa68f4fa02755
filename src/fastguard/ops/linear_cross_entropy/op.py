"""``linear_cross_entropy``: the common case on top of ``lm_head_stats``.

A smoothed label needs the mean of a row's logits, and that is one product with one vector: over the classes v with
weights w_v, sum w_v z_v = scale * (hidden . (W^T w) + b . w). No logits are made for it, and its gradient is exact:
w_v u for row v of the head, with u [D] summed over the rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastguard.ops import transforms
from fastguard.ops.lm_head_stats.op import KEEP_LOGITS_BYTES, call, check
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head, check_device, check_reduction

CLASSES = 2**14
"""Classes of the head that are widened at a time where its dtype is narrower than the sum's."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    filter_tol: float | None = None,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    keep_logits_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of a linear head without N x V logits, beyond those that a budget lets it keep.

    Equals ``torch.nn.functional.cross_entropy`` of the logits, its ``weight`` called ``class_weight``, but for one
    point: with no target left, ``mean`` gives 0 with zero gradients instead of NaN, so that a rank whose rows are all
    masked contributes nothing.

    Args:
        hidden: [..., D]. weight: [V, D]. target: int64 [...], ``ignore_index`` or another negative id to skip.
        bias, scale, softcap: see ``lm_head_stats``, also for dtypes and ``torch.autocast``.
        filter_tol: see ``lm_head_stats``: per row, at most this part of the rest mass 1 - p_t is left to the rank-one
            tail. Class weights and z_loss scale a row's gradient and leave the bound as it is. With smoothing the bound
            still holds for the softmax's part of the gradient (the labels' part is exact), but a gradient may be far
            smaller than 1 - p_t there, since a well-trained row is meant to keep some rest mass: None is then exact.
        label_smoothing: in [0, 1]; this part of each label is spread evenly over all V classes. Costs one read of the
            head and, in its gradient, one more write.
        class_weight: [V], a factor on each class's loss, in any floating dtype; it gets no gradient.
        z_loss: adds ``z_loss * lse^2`` to each row that counts, lse being the log-sum-exp of its logits (PaLM,
            Chowdhery et al. 2022: 1e-4).
        ignore_index: the target that carries no loss.
        reduction: ``none`` for one loss a target, ``sum``, or ``mean``: the cross-entropies over the sum of the
            targets' class weights (their number without), plus the mean of the z-losses over the number of targets.
        keep_logits_bytes: see ``lm_head_stats``. None is its default, and that also where filter_tol is None: rows
            whose logits are kept are then exact, and the filter of the dtype is for those beyond the budget.

    Returns:
        A scalar, or [...] for ``none``, in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: as ``lm_head_stats``, an option out of range, a class_weight that does not fit or needs a gradient,
            or label_smoothing together with softcap, under which the mean logit is no product.
        IndexError: a target of V or more.
        RuntimeError: a forward-mode or a second derivative, which the op does not have.
    """
    head = Head(weight, bias, scale, softcap)
    _check(hidden, head, target, label_smoothing, class_weight, z_loss, reduction)
    flat = target.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    counts = (flat != ignore_index) & (flat >= 0)
    if filter_tol is None:
        if keep_logits_bytes is None:
            keep_logits_bytes = KEEP_LOGITS_BYTES.get(hidden.device.type, 0)
        filter_tol = 0.0 if label_smoothing else None
    wanted = flat.masked_fill(~counts, -1)
    head = check(rows, wanted, head, filter_tol, keep_logits_bytes)  # cast once, for products and the mean logit
    stats, _ = call(rows, wanted, head, filter_tol=filter_tol, keep_logits_bytes=keep_logits_bytes)
    loss = stats.cross_entropy()
    row_weight, classes = None, None
    if class_weight is not None:
        classes = class_weight.to(loss.dtype)
        row_weight = torch.where(counts, classes[flat.clamp_min(0)], 0.0)
        loss = row_weight * loss
    if label_smoothing:
        total = weight.shape[0] if classes is None else classes.sum()
        # Rows that do not count are cut, not weighed by 0: what they hold, infinities included, must not come through.
        live = rows.masked_fill(~counts[:, None], 0.0).to(head.weight.dtype)
        summed = _class_sum(live, head, classes) * scale
        spread = torch.where(counts, total * stats.lse - summed, 0.0)
        loss = (1 - label_smoothing) * loss + (label_smoothing / weight.shape[0]) * spread
    penalty = z_loss * stats.lse.square() if z_loss else None
    if reduction == "mean":
        number = counts.sum().clamp_min(1)
        # Without a target the weights sum to 0 and the loss is 0; targets that all weigh 0 are NaN, as in torch.
        mean = loss.sum() / (number if row_weight is None else row_weight.sum() + ~counts.any())
        return mean if penalty is None else mean + penalty.sum() / number
    if penalty is not None:
        loss = loss + penalty
    return loss.sum() if reduction == "sum" else loss.reshape(target.shape)


def _check(
    hidden: Tensor, head: Head, target: Tensor, label_smoothing: float, class_weight: Tensor | None, z_loss: float,
    reduction: str,
) -> None:  # fmt: skip
    check_reduction(reduction)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target: expected shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target: expected int64 class indices, got {target.dtype}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 <= label_smoothing <= 1, got {label_smoothing}")
    if label_smoothing and head.softcap is not None:
        raise ValueError(
            f"label_smoothing: expected 0 where logits are soft-capped (softcap={head.softcap}), got {label_smoothing}"
        )
    transforms.check_plain(hidden=hidden, weight=head.weight, class_weight=class_weight)
    if class_weight is not None:
        classes = head.weight.shape[0]
        if class_weight.shape != (classes,) or not class_weight.is_floating_point():
            raise ValueError(
                f"class_weight: expected floating [{classes}], got {class_weight.dtype} {tuple(class_weight.shape)}"
            )
        if class_weight.requires_grad:
            raise ValueError("class_weight: expected a tensor that needs no gradient (class_weight.detach())")
        check_device(hidden, class_weight=class_weight)


@transforms.without_autocast
def _class_sum(rows: Tensor, head: Head, classes: Tensor | None) -> Tensor:
    """[N], for each row the sum over v of classes_v * (rows . weight_v + bias_v), in the accumulation dtype.

    rows: [N, D]. classes: [V] in the accumulation dtype, None for ones. Neither a wide copy of the head nor rounded
    weights: the head is summed where it is, or widened ``CLASSES`` rows at a time.
    """
    wide = accumulation_dtype(rows.dtype)
    if classes is None:
        summed = head.weight.sum(0, dtype=wide)
    elif head.weight.dtype == wide:
        summed = classes @ head.weight
    else:
        parts = zip(classes.split(CLASSES), head.weight.split(CLASSES), strict=True)
        summed = torch.stack([c @ w.to(wide) for c, w in parts]).sum(0)
    products = rows.to(wide) @ summed
    if head.bias is None:
        return products
    return products + (head.bias.sum(dtype=wide) if classes is None else classes @ head.bias.to(wide))

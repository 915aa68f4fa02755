"""``lens_stats``: ``lm_head_stats`` of an un-normed hidden state at chosen rows, as one op.

The op keeps the hidden state that the model keeps anyway; neither the gathered nor the normed rows outlive it.
Arithmetic: ``ops/final_norm`` and the backends of ``ops/lm_head_stats``.
"""

from __future__ import annotations

from torch import Tensor

from fastguard.ops import transforms
from fastguard.ops.lm_head_stats import op
from fastguard.ops.lm_head_stats.op import LMHeadStats
from fastguard.ops.vocabulary import Head, Norm


def lens_stats(
    hidden: Tensor,
    rows: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    norm_kind: str = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    filter_tol: float | None = None,
    with_mean: bool = False,
    keep_logits_bytes: int | None = None,
    token: Tensor | None = None,
) -> tuple[LMHeadStats, Tensor | None]:
    """Statistics of head(final_norm(hidden[rows])) and the next gradient token.

    Args:
        hidden: [..., D], read as [M, D] rows.
        rows: [N] int64, indices into the M rows; none twice.
        weight, target, bias, scale, softcap, filter_tol, with_mean, keep_logits_bytes: see ``lm_head_stats``; under
            ``torch.autocast`` the norm reads ``hidden`` as it is, and its result is rounded for the products. Every
            call keeps its own logits: give 0 where many states are read exactly before one backward.
        norm_kind: ``none``, ``rms``, ``rms_offset`` (Gemma's 1 + weight) or ``layer``.
        norm_weight, norm_bias: [D] or None. norm_eps: the norm's epsilon.
        token: None, or a tensor of the shape of ``weight`` in the accumulation dtype whose *gradient* is the
            one buffer that collects the head's gradient of all calls: pass each call's returned token to the
            next, ``weight`` detached, and each token once. The token itself holds 4 bytes.

    Raises:
        ValueError: shapes, dtypes, devices or a norm kind that do not fit, a DTensor.
        IndexError: a target of V or more.
        RuntimeError: a forward-mode or a second derivative, which the op does not have.
    """
    return lens(
        hidden, rows, target, Head(weight, bias, scale, softcap), Norm(norm_kind, norm_weight, norm_bias, norm_eps),
        filter_tol=filter_tol, with_mean=with_mean, keep_logits_bytes=keep_logits_bytes, token=token,
    )  # fmt: skip


def lens(
    hidden: Tensor,
    rows: Tensor,
    target: Tensor,
    head: Head,
    norm: Norm,
    *,
    filter_tol: float | None = None,
    with_mean: bool = False,
    keep_logits_bytes: int | None = None,
    token: Tensor | None = None,
) -> tuple[LMHeadStats, Tensor | None]:
    """``lens_stats`` for callers that hold the head and the norm in one piece each."""
    if token is not None and token.shape != head.weight.shape:
        raise ValueError(f"token: expected the shape of weight {tuple(head.weight.shape)}, got {tuple(token.shape)}")
    transforms.check_plain(norm_weight=norm.weight, norm_bias=norm.bias, token=token)
    head = op.check(hidden, target, head, filter_tol, keep_logits_bytes, rows)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return op.call(
        flat, target, head, norm, rows=rows, filter_tol=filter_tol, with_mean=with_mean,
        keep_logits_bytes=keep_logits_bytes, token=token,
    )  # fmt: skip

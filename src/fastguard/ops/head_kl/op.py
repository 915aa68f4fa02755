"""``head_kl``: KL(teacher || student) of each row from two hidden states, without the N x V logits.

The schema, the fakes and the autograd formula live here, once; the arithmetic lives in the backend modules
beside this file, which all expose ``forward`` and ``backward`` with the signatures of ``portable.py``.

Cost: the forward is two products, 4 N D V flops. The backward makes both again (4 N D V) and adds one for each gradient
that is wanted (2 N D V for the hidden state, 2 N D V for the weight). Kept for it: the inputs and two numbers a row.

A head that is not trained, the usual one, needs no backward: upstream gradients are one number a row, so that the
forward can make the hidden state's gradient up to that number while a tile's logits are at hand. That is 6 N D V in all
on CPUs (GPUs keep no tile, and pay 10 N D V either way), and one [N, D] kept in the place of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head, check_head


def head_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) of the two heads' predictions, row by row; what CRL, RepBend and NPO retain with.

    With z = softcap(scale * (hidden @ weight.T + bias)) / temperature for either, the row is the mean under the
    teacher of z_t - z_s, less lse_t, plus lse_s. It does not cancel as the student nears the teacher: it is summed as
    p_t (exp(-u) - 1 + u), u = log p_t - log p_s, whose terms are not negative. With one head for both, z_t - z_s is the
    product of ``teacher - student`` (but for half precision on GPUs, which subtracts the products in fp32): the result
    and its gradient are accurate to the dtype's rounding at any distance.

    Args:
        student: [N, D], any strides; float64, float32, bfloat16 or float16.
        teacher: [N, D], in the dtype of ``student``; a constant, as are its logits: it gets no gradient.
        weight: [V, D], the head, in the dtype of ``student``. Its gradient, through the student's logits alone, is
            skipped where it needs none.
        bias: [V] in the dtype of ``student``, or None.
        teacher_weight: [V, D], the head that makes the teacher's logits; None for ``weight`` as it is now. Of a head
            that is trained it must be the one from before training, or the teacher moves along. Needs bias=None.
        scale: factor on the logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: logits become ``softcap * tanh(z / softcap)`` (Gemma 2: 30); None for none.
        temperature: divides both models' logits, after the soft-cap. The result is *not* multiplied by its square.

    Returns:
        [N], fp32 (float64 for float64 inputs), not negative but for rounding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, a softcap or temperature that is not positive.
    """
    _check(student, teacher, Head(weight, bias, scale, softcap), teacher_weight, temperature)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    kl, _, _, _ = torch.ops.fastguard.head_kl(
        student,
        teacher.detach(),
        weight,
        bias,
        None if teacher_weight is None else teacher_weight.detach(),
        # cap tanh(s x / cap) / T = (cap / T) tanh((s / T) x / (cap / T)): the backends need no temperature.
        scale / temperature,
        0.0 if softcap is None else softcap / temperature,
        torch.is_grad_enabled() and student.requires_grad and not trained,
    )
    return kl  # type: ignore[no-any-return]


def _check(student: Tensor, teacher: Tensor, head: Head, teacher_weight: Tensor | None, temperature: float) -> None:
    if student.dim() != 2:
        raise ValueError(f"student: expected [N, D], got shape {tuple(student.shape)}")
    check_head(head, student, "student", teacher=teacher, teacher_weight=teacher_weight)
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: expected the shape of student {tuple(student.shape)}, got {tuple(teacher.shape)}")
    weight, bias = head.weight, head.bias
    if teacher_weight is not None and teacher_weight.shape != weight.shape:
        raise ValueError(
            f"teacher_weight: expected the shape of weight {tuple(weight.shape)}, got {tuple(teacher_weight.shape)}"
        )
    if bias is not None and teacher_weight is not None:
        raise ValueError("bias: expected None with a teacher_weight, whose own bias would be another, got a tensor")
    for name, tensor in (("teacher", teacher), ("weight", weight), ("bias", bias), ("teacher_weight", teacher_weight)):
        if tensor is not None and tensor.dtype != student.dtype:
            raise ValueError(f"{name}: expected the dtype of student ({student.dtype}), got {tensor.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


@torch.library.custom_op("fastguard::head_kl", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor | None,
    scale: float,
    softcap: float,
    ahead: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ahead: also the gradient of each row's divergence at ``student`` [N, D], in its dtype."""
    impl = backend.choose("head_kl", student.device)
    row, slope = impl.forward(student, teacher, Head(weight, bias, scale, softcap or None), teacher_weight, ahead)
    return (*row, student.new_zeros(0) if slope is None else slope.to(student.dtype))


@_forward.register_fake
def _(student, teacher, weight, bias, teacher_weight, scale, softcap, ahead):  # type: ignore[no-untyped-def]
    def row() -> Tensor:
        return student.new_empty(student.shape[0], dtype=accumulation_dtype(student.dtype))

    return row(), row(), row(), student.new_empty(student.shape if ahead else 0)


@torch.library.custom_op("fastguard::head_kl_backward", mutates_args=())
def _backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_weight: Tensor | None,
    scale: float,
    softcap: float,
    lse: Tensor,
    gap: Tensor,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    impl = backend.choose("head_kl", student.device)
    found = impl.backward(
        grad.to(lse.dtype).contiguous(), student, teacher, Head(weight, bias, scale, softcap or None), teacher_weight,
        lse, gap, need_student, need_weight, need_bias,
    )  # fmt: skip
    return tuple(student.new_zeros(0) if g is None else g.to(student.dtype) for g in found)  # type: ignore[return-value]


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, student, teacher, weight, bias, teacher_weight, scale, softcap, lse, gap, need_student, need_weight, need_bias
):
    def like(t: Tensor | None, needed: bool) -> Tensor:
        return student.new_empty(t.shape if t is not None and needed else 0)

    return like(student, need_student), like(weight, need_weight), like(bias, need_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, weight, bias, teacher_weight, *ctx.head, ctx.ahead = inputs
    _, lse, gap, slope = output
    ctx.mark_non_differentiable(lse, gap, slope)
    ctx.set_materialize_grads(False)
    if ctx.ahead:
        ctx.save_for_backward(slope)
    else:
        ctx.save_for_backward(student, teacher, weight, bias, teacher_weight, lse, gap)


def _autograd(ctx, grad, _lse, _gap, _slope):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]
    if grad is None or not any(needs):
        return (None,) * 8
    if ctx.ahead:
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), *(None,) * 7
    student, teacher, weight, bias, teacher_weight, lse, gap = ctx.saved_tensors
    found = torch.ops.fastguard.head_kl_backward(
        grad, student, teacher, weight, bias, teacher_weight, *ctx.head, lse, gap, *needs
    )
    dstudent, dweight, dbias = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return dstudent, None, dweight, dbias, *(None,) * 4


_forward.register_autograd(_autograd, setup_context=_setup_context)

"""``lm_head_stats``: what every vocabulary loss needs of each row, without the N x V logits.

The schema, the fake and the autograd formula live here, once; the arithmetic lives in the backend modules
beside this file, which all expose ``forward`` and ``backward`` with the signatures of ``portable.py``.

Cost: the forward is 2 N D V flops. The backward reads only the *live columns* that the forward recorded
per tile of ``TILE`` rows (a byte a column: 255 live, 1..254 the logarithm of the dropped column's mass, 0
nothing), so its floor is 6 N D C flops for C live columns, against 6 N D V for an exact recomputation. Rows whose
products the forward kept, at most ``keep_logits_bytes`` of them, are exact for 4 N D V.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.lm_head_stats import order
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.vocabulary import Head, Norm, check_head, check_reduction

TILE = 128
"""Rows that share one set of live columns."""

DEFAULT_FILTER_TOL = {torch.float64: 0.0, torch.float32: 0.05, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest part of a row's rest mass (1 - p_target) that the backward may replace by its rank-one tail."""


KEEP_LOGITS_BYTES = {"cpu": 128 * 2**20}
"""By type of device, up to how many bytes of logits one call keeps for its exact backward; elsewhere none."""


class Row(NamedTuple):
    """Per-row statistics, each [R] for a tile or [N] for a call."""

    lse: Tensor
    rest_lse: Tensor
    target_logit: Tensor
    mean_logit: Tensor


class Grads(NamedTuple):
    """Upstream gradients of a `Row`; None where there is none."""

    lse: Tensor | None
    rest_lse: Tensor | None
    target_logit: Tensor | None
    mean_logit: Tensor | None


class Saved(NamedTuple):
    """What a backend's backward reads of the forward's `Row`; mean_logit is None where it was not asked for."""

    lse: Tensor
    rest_lse: Tensor
    mean_logit: Tensor | None


Bundle = TypeVar("Bundle", Grads, Saved)


def part(whole: Bundle, rows: slice) -> Bundle:
    """The tensors of a bundle, some rows of each."""
    cut: list[Any] = [None if t is None else t[rows] for t in whole]
    return type(whole)(*cut)


class LMHeadStats(NamedTuple):
    """Per-row statistics of the logits, each [N], fp32 (float64 for float64 inputs); 0 in rows without a target."""

    lse: Tensor
    rest_lse: Tensor
    target_logit: Tensor
    mean_logit: Tensor | None

    @property
    def counts(self) -> Tensor:
        """Which rows have a target, [N] bool.

        Statistics of 0 say which have none: of two logits that are both 0 the log-sum-exp is log 2.
        """
        return (self.lse != 0) | (self.rest_lse != 0) | (self.target_logit != 0)

    def cross_entropy(self, reduction: str = "none") -> Tensor:
        """-log p(target); nothing cancels where the model is sure of its target.

        Args:
            reduction: as in ``torch.nn.functional.cross_entropy``. ``none``: of each row, [N], 0 in rows whose target
                is negative. ``sum``: their sum. ``mean``: over the rows that have a target; NaN if none has.

        Raises:
            ValueError: an unknown reduction.
        """
        check_reduction(reduction)
        # Past 40 the softplus is its argument to the last bit of a double, and exp(40) is finite in fp32.
        loss = torch.nn.functional.softplus(self.rest_lse - self.target_logit, threshold=40.0)
        counts = self.counts
        loss = torch.where(counts, loss, 0.0)
        if reduction == "none":
            return loss
        return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()

    def log_one_minus_p(self) -> Tensor:
        """log(1 - p(target)) of each row, [N], 0 in rows whose target is negative.

        Nothing cancels where the target is all but impossible.
        """
        loss = -torch.nn.functional.softplus(self.target_logit - self.rest_lse, threshold=40.0)
        return torch.where(self.counts, loss, 0.0)


def lm_head_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    filter_tol: float | None = None,
    with_mean: bool = False,
    keep_logits_bytes: int | None = None,
) -> LMHeadStats:
    """Log-sum-exp, log-sum-exp without the target, target logit and (on request) mean logit of every row.

    With z = softcap(scale * (hidden @ weight.T + bias)) and t the target of a row: cross-entropy is
    ``softplus(rest_lse - target_logit)``, log(1 - p_t) is ``-softplus(target_logit - rest_lse)``, the negative entropy
    is ``mean_logit - lse``; none of the three cancels.

    Args:
        hidden: [N, D], any strides; float64, float32, bfloat16 or float16. Stacked hidden states [L, N, D] are read
            against one ``target`` [N] and give statistics [L, N].
        weight: [V, D], the head, in the dtype of ``hidden``. Its gradient is skipped where it needs none. Under
            ``torch.autocast`` either may have any dtype but float64: products are taken in autocast's, as
            ``torch.nn.functional.linear`` takes them, statistics in fp32.
        target: [N] int64; a negative target leaves the row out: its statistics are 0, its gradient 0.
        bias: [V] or None.
        scale: factor on the logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: logits become ``softcap * tanh(z / softcap)`` (Gemma 2: 30); None for none.
        filter_tol: per row, at most this part of the rest mass 1 - p_t is left to the backward's rank-one
            tail; 0 is exact, None takes the default of the dtype (``DEFAULT_FILTER_TOL``).
        with_mean: also return ``mean_logit``; otherwise it is None and costs nothing.
        keep_logits_bytes: the logits of the first rows, as many as fit into so many bytes in the dtype of the products,
            are kept for the backward, which is exact for them and does not multiply them again: 4 N D V flops instead
            of 6 N D V. Nothing is kept where nothing needs a gradient. None: where filter_tol is 0, 128 MiB on a CPU
            and nothing on other devices; else nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, a filter_tol outside [0, 1), or negative
            keep_logits_bytes.
        IndexError: a target of V or more.
        RuntimeError: a forward-mode or a second derivative, which the op does not have.
    """
    if hidden.dim() == 3 and target.dim() == 1:
        layers, n, d = hidden.shape
        if target.shape != (n,):
            raise ValueError(f"target: expected int64 [{n}], got {target.dtype} {tuple(target.shape)}")
        stacked = lm_head_stats(
            hidden.reshape(layers * n, d), weight, target.repeat(layers), bias=bias, scale=scale, softcap=softcap,
            filter_tol=filter_tol, with_mean=with_mean, keep_logits_bytes=keep_logits_bytes,
        )  # fmt: skip
        return LMHeadStats(*(None if s is None else s.reshape(layers, n) for s in stacked))  # type: ignore[arg-type]
    head = check(hidden, target, Head(weight, bias, scale, softcap), filter_tol, keep_logits_bytes)
    stats, _ = call(
        hidden, target, head, filter_tol=filter_tol, with_mean=with_mean, keep_logits_bytes=keep_logits_bytes
    )
    return stats


def check(
    hidden: Tensor, target: Tensor, head: Head, filter_tol: float | None, keep_logits_bytes: int | None,
    rows: Tensor | None = None,
) -> Head:  # fmt: skip
    """Raise a ValueError that names the argument which does not fit; returns the head as products read it."""
    if hidden.dim() != 2 and rows is None:
        raise ValueError(f"hidden: expected [N, D], got shape {tuple(hidden.shape)}")
    check_head(head, hidden, "hidden", target=target, rows=rows)
    product = transforms.product_dtype(hidden)
    if transforms.product_dtype(head.weight) != product:
        raise ValueError(
            f"weight: expected the dtype of hidden ({hidden.dtype}), got {head.weight.dtype}; cast one of them, or "
            "call the op under torch.autocast"
        )
    n = hidden.shape[0] if rows is None else rows.shape[0]
    if target.shape != (n,) or target.dtype != torch.int64:
        raise ValueError(f"target: expected int64 [{n}], got {target.dtype} {tuple(target.shape)}")
    if filter_tol is not None and not 0 <= filter_tol < 1:
        raise ValueError(f"filter_tol: expected 0 <= filter_tol < 1 or None, got {filter_tol}")
    if keep_logits_bytes is not None and keep_logits_bytes < 0:
        raise ValueError(f"keep_logits_bytes: expected 0 or more, or None, got {keep_logits_bytes}")
    return replace(head, weight=head.weight.to(product))


def call(
    hidden: Tensor,
    target: Tensor,
    head: Head,
    norm: Norm | None = None,
    *,
    rows: Tensor | None = None,
    filter_tol: float | None = None,
    with_mean: bool = False,
    keep_logits_bytes: int | None = None,
    token: Tensor | None = None,
) -> tuple[LMHeadStats, Tensor | None]:
    """The unchecked op behind the family; returns the statistics and the next token.

    head: its weight in the dtype of the products, to which the (normed) rows are rounded if theirs is another.
    norm, rows: None to read ``hidden`` as it is. token: see ``lens_stats``. With a token, the gradient of the head's
    weight flows into the token's gradient.
    """
    if token is not None and transforms.under_func():
        raise RuntimeError("token: has no meaning under torch.func; give the weight itself the gradient")
    if filter_tol is None:
        filter_tol = DEFAULT_FILTER_TOL[hidden.dtype]
    if keep_logits_bytes is None:
        keep_logits_bytes = 0 if filter_tol else KEEP_LOGITS_BYTES.get(hidden.device.type, 0)
    norm = norm or Norm()
    inputs = (hidden, head.weight, head.bias, norm.weight, norm.bias, token)
    record = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    most = keep_logits_bytes // (head.weight.shape[0] * head.weight.element_size()) if record else 0
    lse, rest_lse, target_logit, mean_logit, _, _, token_out = _call_forward(
        hidden, rows, head.weight, head.bias, target, norm.kind, norm.weight, norm.bias, norm.eps,
        head.scale, head.softcap or 0.0, filter_tol, with_mean, record, most, token,
    )  # fmt: skip
    stats = LMHeadStats(lse, rest_lse, target_logit, mean_logit if with_mean else None)
    return stats, (token_out if token is not None else None)


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of each target: its version and the vocabulary it was read for, and what `_valid` found."""


def _valid(target: Tensor, vocabulary: int) -> Tensor | None:
    """Indices of the rows that count, or None if all do.

    Found once for each version of a tensor, since a GPU must be waited for to know: all states of a lens, and their
    backwards, have one target. (So a CUDA graph keeps the rows that counted when it was captured.)
    """
    if target.numel() == 0:
        return None
    of = (None if target.is_inference() else target._version, vocabulary)  # inference tensors do not count versions
    if of[0] is None or _known.get(target, (None, None))[0] != of:
        _known[target] = of, _counting(target, vocabulary)
    return _known[target][1]


def _counting(target: Tensor, vocabulary: int) -> Tensor | None:
    too_large = (target >= vocabulary).any()
    if target.device.type == "cpu":
        if too_large:
            raise IndexError(f"target: expected token ids below {vocabulary}, got {int(target.max())}")
    else:
        torch._assert_async(~too_large)
    ignored = target < 0
    return (~ignored).nonzero()[:, 0] if bool(ignored.any()) else None


def _tiles(n: int) -> int:
    return -(-n // TILE)


@torch.library.custom_op("fastguard::lm_head_stats", mutates_args=())
@transforms.without_autocast
def _forward(
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    norm_kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    scale: float,
    softcap: float,
    filter_tol: float,
    with_mean: bool,
    record: bool,
    most: int,
    token: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    impl, final_norm = (backend.choose(op, hidden.device) for op in ("lm_head_stats", "final_norm"))
    head, norm = Head(weight, bias, scale, softcap or None), Norm(norm_kind, norm_weight, norm_bias, norm_eps)
    valid = _valid(target, weight.shape[0])
    picked = rows if valid is None else valid if rows is None else rows[valid]
    x = final_norm.forward(hidden, picked, norm, weight.dtype)
    t = target if valid is None else target[valid]
    columns_size, kept_size = _sizes(target, weight, filter_tol, record, most)
    columns = torch.zeros(columns_size, dtype=torch.uint8, device=hidden.device)
    kept = torch.empty(kept_size, dtype=weight.dtype, device=hidden.device)
    first = kept.view(-1, weight.shape[0])[: t.numel()]
    k = len(first)
    tiles = columns.view(-1, weight.shape[0] + 4 * TILE)[: _tiles(t.numel() - k)]
    stats = order.forward(impl, x[k:], head, t[k:], filter_tol, with_mean, tiles)
    if k:
        stats = Row(*map(torch.cat, zip(impl.keep(x[:k], head, t[:k], with_mean, first), stats, strict=True)))
    if valid is not None:
        stats = Row(*(s.new_zeros(target.shape).index_copy_(0, valid, s) for s in stats))
    lse, rest_lse, target_logit, mean_logit = stats
    if not with_mean:
        mean_logit = lse.new_zeros(0)
    return lse, rest_lse, target_logit, mean_logit, columns, kept, _next_token(weight, token)


def _sizes(target: Tensor, weight: Tensor, filter_tol: float, record: bool, most: int) -> tuple[int, int]:
    """Of the column codes, with the numbers of their tile's rows (order.py), and of the kept products.

    Flat: of a size [tiles, V] tracing asks whether tiles is 1, and torch.export would be bound to one tile of rows. It
    asks whether a size is 0 too: room for one more tile than there may be spares a graph for those who keep every row.
    """
    n, classes = target.shape[0], weight.shape[0]
    kept, others = (torch.sym_min(n, most), torch.sym_max(n - most, 0)) if most else (0, n)
    return ((others // TILE + 1) * (classes + 4 * TILE) if record and filter_tol > 0 else 0), kept * classes


def _next_token(weight: Tensor, token: Tensor | None) -> Tensor:
    if token is None:
        return weight.new_zeros(0)
    return torch.zeros((), dtype=token.dtype, device=weight.device).expand(token.shape)


@_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, rows, weight, bias, target, norm_kind, norm_weight, norm_bias, norm_eps,
    scale, softcap, filter_tol, with_mean, record, most, token,
):  # fmt: skip
    def stat(n: int = target.shape[0]) -> Tensor:
        return hidden.new_empty(n, dtype=accumulation_dtype(hidden.dtype))

    columns_size, kept_size = _sizes(target, weight, filter_tol, record, most)
    columns = hidden.new_empty(columns_size, dtype=torch.uint8)
    mean = stat() if with_mean else stat(0)
    return stat(), stat(), stat(), mean, columns, weight.new_empty(kept_size), _next_token(weight, token)


@torch.library.custom_op("fastguard::lm_head_stats_backward", mutates_args=("acc",))
@transforms.without_autocast
def _backward(
    grad_lse: Tensor | None,
    grad_rest: Tensor | None,
    grad_target: Tensor | None,
    grad_mean: Tensor | None,
    hidden: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    norm_kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    scale: float,
    softcap: float,
    lse: Tensor,
    rest_lse: Tensor,
    mean_logit: Tensor,
    columns: Tensor,
    kept: Tensor,
    acc: Tensor | None,
    fresh: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    impl, final_norm = (backend.choose(op, hidden.device) for op in ("lm_head_stats", "final_norm"))
    head, norm = Head(weight, bias, scale, softcap or None), Norm(norm_kind, norm_weight, norm_bias, norm_eps)
    wide = accumulation_dtype(hidden.dtype)
    valid = _valid(target, weight.shape[0])
    picked = rows if valid is None else valid if rows is None else rows[valid]
    x = final_norm.forward(hidden, picked, norm, weight.dtype)

    def at(s: Tensor) -> Tensor:
        return (s if valid is None else s[valid]).to(wide).contiguous()

    def given(s: Tensor | None) -> Tensor | None:
        return None if s is None or s.numel() == 0 else at(s)

    t = target if valid is None else target[valid]
    grads = Grads(*map(given, (grad_lse, grad_rest, grad_target, grad_mean)))
    saved = Saved(at(lse), at(rest_lse), given(mean_logit))
    first = kept.view(-1, weight.shape[0])[: t.numel()]
    k, n = len(first), t.numel()
    exact = k == n or not (k or columns.numel())  # then each block of the weight's gradient is made once, for all rows
    alone = exact and acc is None  # and may be written in the weight's own dtype
    dweight = acc
    if need_weight and acc is None:
        dweight = torch.empty(weight.shape, dtype=weight.dtype if alone else wide, device=weight.device)
        fresh = True
    if dweight is not None and fresh and not (k or exact):
        dweight.zero_()
    dbias = torch.zeros(weight.shape[:1], dtype=wide, device=weight.device) if need_bias else None
    dx = None
    if k or exact:
        m = n if exact else k
        dx = impl.read_kept(
            part(grads, slice(m)), x[:m], head, t[:m], part(saved, slice(m)), first if k else None, need_hidden,
            dweight, dbias, overwrite=fresh,
        )  # fmt: skip
    if not exact:
        others = slice(k, None)
        tiles = columns.view(-1, weight.shape[0] + 4 * TILE)[: _tiles(n - k)] if columns.numel() else None
        dy = order.backward(
            impl, part(grads, others), x[k:], head, t[k:], part(saved, others), tiles, need_hidden, dweight, dbias
        )
        dx = dy if dx is None or dy is None else torch.cat([dx, dy])
    none = hidden.new_zeros(0)
    dhidden: Tensor = none
    dnorm_weight, dnorm_bias = None, None
    if dx is not None:
        dhidden, dnorm_weight, dnorm_bias = final_norm.backward(dx, hidden, picked, norm)
        if dhidden is dx:
            dhidden = dx.clone()
    return (
        dhidden,
        none.clone() if dweight is None or acc is not None else dweight.to(weight.dtype),
        _like(dbias, bias, none),
        _like(dnorm_weight, norm_weight, none),
        _like(dnorm_bias, norm_bias, none),
    )


def _like(grad: Tensor | None, parameter: Tensor | None, none: Tensor) -> Tensor:
    return none.clone() if grad is None or parameter is None else grad.to(parameter.dtype)


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_lse, grad_rest, grad_target, grad_mean, hidden, rows, weight, bias, target, norm_kind, norm_weight,
    norm_bias, norm_eps, scale, softcap, lse, rest_lse, mean_logit, columns, kept, acc, fresh,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    def like(t: Tensor | None, needed: bool) -> Tensor:
        return (
            hidden.new_empty(0)
            if t is None or not needed
            else torch.empty_like(t, memory_format=torch.contiguous_format)
        )

    norm = need_hidden and norm_kind != "none"
    return (
        like(hidden, need_hidden),
        like(weight, need_weight and acc is None),
        like(bias, need_bias),
        like(norm_weight, norm),
        like(norm_bias, norm),
    )


INPUTS = tuple(a.name for a in torch.ops.fastguard.lm_head_stats.default._schema.arguments)
"""The schema's arguments, in order."""


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = dict(zip(INPUTS, inputs, strict=True))
    lse, rest_lse, _, mean_logit, columns, kept, _ = output
    ctx.mark_non_differentiable(columns, kept)
    ctx.set_materialize_grads(False)
    tensors = (given[name] for name in ("hidden", "rows", "weight", "bias", "target", "norm_weight", "norm_bias"))
    ctx.save_for_backward(*tensors, lse, rest_lse, mean_logit, columns, kept)
    ctx.norm = given["norm_kind"], given["norm_eps"]
    ctx.head = given["scale"], given["softcap"]
    token = given["token"]
    ctx.token = None if token is None else (token.shape, token.dtype)


def _autograd(  # type: ignore[no-untyped-def]
    ctx, grad_lse, grad_rest, grad_target, grad_mean, _columns, _kept, acc
):
    hidden, rows, weight, bias, target, norm_weight, norm_bias, *found = ctx.saved_tensors
    norm_kind, norm_eps = ctx.norm
    needs = dict(zip(INPUTS, ctx.needs_input_grad, strict=True))
    need_norm = needs["norm_weight"] or needs["norm_bias"]
    if all(g is None for g in (grad_lse, grad_rest, grad_target, grad_mean)):
        return tuple(acc if name == "token" else None for name in INPUTS)
    fresh = ctx.token is not None and acc is None
    if ctx.token is None:
        acc = None
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("token: has no second derivative (create_graph=True); give the weight itself the gradient")
    elif fresh:
        shape, dtype = ctx.token
        acc = torch.empty(shape, dtype=dtype, device=weight.device)  # the op writes before it adds
    dhidden, dweight, dbias, dnorm_weight, dnorm_bias = _call_backward(
        grad_lse, grad_rest, grad_target, grad_mean, hidden, rows, weight, bias, target,
        norm_kind, norm_weight, norm_bias, norm_eps, *ctx.head, *found, acc, fresh,
        needs["hidden"] or need_norm, needs["weight"] or acc is not None, needs["bias"],
    )  # fmt: skip
    given = {
        "hidden": dhidden, "bias": dbias, "norm_weight": dnorm_weight, "norm_bias": dnorm_bias,
        "weight": dweight if acc is None else None,
    }  # fmt: skip
    return tuple(acc if name == "token" else given.get(name) if needs[name] else None for name in INPUTS)


_call_forward = transforms.bind("lm_head_stats", _forward, _setup_context, _autograd)
_call_backward = transforms.bind_backward("lm_head_stats", _backward)

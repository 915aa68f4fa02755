"""A hidden state read through the final norm and the head: the statistics of chosen rows."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fastguard.ops import transforms
from fastguard.ops.lens_stats.op import lens
from fastguard.ops.lm_head_stats import packed
from fastguard.ops.lm_head_stats.op import LMHeadStats
from fastguard.ops.vocabulary import Head, Norm
from fastguard.taps import anchor
from fastguard.taps.structure import Structure, head_parameters

SHIFTED = "_fastguard_shifted"
"""Attribute of modules that for the moment compute something other than their parameters say: what shifts them."""


class Lens:
    """The head and the final norm as all taps of one loss call share them.

    The head's gradient is one buffer for all taps: a token passes from tap to tap and its gradient is the
    buffer (see ``lens_stats``). Construct it before the forward, while parameters are sharded.

    The head is gathered and its token made at first use: a buffer that only the output's tap writes to is reduced and
    freed before the backward comes to the layers. The gathered copy is held by the graph of the taps alone once the
    forward is over, and so freed after the last of them; a recomputation gathers it again.

    Args:
        structure: the model's parts.
        filter_tol: of the inner hidden states, as for ``lm_head_stats``: None is the default of the dtype.
        output_tol: the same of the output, whose gradient passes through every layer and whose broad distribution
            leaves little to skip: exact unless asked for.
        inner_transform: whether inner states too pass the model's soft-cap and logit scale.
        keep_logits_bytes: of the output, as for ``lm_head_stats``; of the many inner states nothing is kept.

    Raises:
        RuntimeError: the head or the norm does not compute what its parameters say (see `SHIFTED`).
    """

    def __init__(
        self, structure: Structure, filter_tol: float | None = None, output_tol: float | None = 0.0,
        inner_transform: bool = True, keep_logits_bytes: int | None = None,
    ) -> None:  # fmt: skip
        for part in (structure.head, structure.norm):
            for by in (getattr(module, SHIFTED) for module in part.modules() if hasattr(module, SHIFTED)):
                raise RuntimeError(
                    f"{type(part).__name__}: its output is shifted by {by}, which a loss that reads its weight would "
                    "miss; use a loss on the model's own logits"
                )
        self.structure, self.filter_tol, self.output_tol = structure, filter_tol, output_tol
        self.inner_transform, self.keep_logits_bytes = inner_transform, keep_logits_bytes
        weight, bias = head_parameters(structure.head)
        self._head, self._begun = anchor.Source(structure.model, weight), False
        self.weight: Tensor | None = None
        self.first_token: Tensor | None = None
        self.token: Tensor | None = None
        self.bias = anchor.anchored(structure.model, bias)
        self.norm_weight = self.norm_bias = None
        if structure.norm_kind is not None:
            self.norm_weight, self.norm_bias = (
                anchor.anchored(structure.model, getattr(structure.norm, name, None)) for name in ("weight", "bias")
            )

    def begin(self, dtype: torch.dtype | None = None) -> None:
        """Gather the head, in ``dtype``, and make its first token, unless they are there.

        `statistics` does it at first use; do it before a compiled forward, in whose graph nothing is to be sent.
        """
        if self.weight is None:
            self.weight = self._head.full(dtype)
            packed.constant(self.weight)
        if not self._begun:
            self._begun = True
            self.first_token = self.token = self._head.token()
            if self.first_token is not None:  # its gradient is there once the last tap's backward is over
                lens = weakref.ref(self)
                self.first_token.register_hook(lambda _: _release(lens()))

    def cross_entropy(self, hidden: Tensor, rows: Tensor, target: Tensor, normed: bool, keep: bool) -> Tensor:
        """Cross-entropy [N] of head(norm(hidden[rows])) against target; see `statistics`."""
        return self.statistics(hidden, rows, target, normed, keep).cross_entropy()

    def statistics(
        self, hidden: Tensor, rows: Tensor, target: Tensor, normed: bool, keep: bool, with_mean: bool = False
    ) -> LMHeadStats:
        """Statistics, each [N], of head(norm(hidden[rows])) against target, fp32 (float64 for float64).

        Args:
            hidden: [..., D]. rows: [N] into its flattened rows. target: [N].
            normed: ``hidden`` is the model's output, which has been through the final norm already.
            keep: False in a recompute, whose results are dropped: it must not take part in the token chain.
            with_mean: also the mean logit; see ``lm_head_stats``.
        """
        kind = "none" if normed else self.structure.norm_kind
        if kind is None:
            hidden = self.structure.norm.forward(hidden.reshape(-1, hidden.shape[-1])[rows])
            rows, kind = torch.arange(rows.shape[0], device=rows.device), "none"
        filter_tol = self.output_tol if normed else self.filter_tol
        # Mixed precision: products in autocast's dtype, else in the activations'; cast once for all taps.
        self.begin(dtype := transforms.product_dtype(hidden))
        assert self.weight is not None
        self.weight = self.weight.to(dtype)
        plain = not normed and not self.inner_transform
        scale, softcap = (1.0, None) if plain else (self.structure.scale, self.structure.softcap)
        head = Head(self.weight, self.bias, scale, softcap)
        norm = Norm() if kind == "none" else Norm(kind, self.norm_weight, self.norm_bias, self.structure.norm_eps)
        token = self.token if keep else self.first_token
        stats, token = lens(
            hidden, rows, target, head, norm, filter_tol=filter_tol, with_mean=with_mean,
            keep_logits_bytes=self.keep_logits_bytes if normed else 0, token=token,
        )  # fmt: skip
        if keep:
            self.token = token
        return stats

    def end(self) -> None:
        """Forget the token, which refers to the graph, whose checkpoints refer to this lens; and the gathered head."""
        self.token = None
        self._let_go()

    def _let_go(self) -> None:
        if self.weight is not None:
            packed.release(self.weight)
            self.weight = None


def _release(lens: Lens | None) -> None:
    """Let go of a head that was gathered again for recomputations."""
    if lens is not None:
        lens._let_go()

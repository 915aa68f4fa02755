"""One forward and backward under watch: inputs and outputs' gradients go into the sums where they arise.

Shapes: B samples, T tokens, O outputs, I inputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.ops.abs_weight_grad import abs_weight_grad_
from fastguard.ops.column_norms import column_norms_
from fastguard.ops.gram import gram_
from fastguard.ops.precision import accumulation_dtype
from fastguard.saliency.places import EMBEDDING, HEAD, Place
from fastguard.saliency.rows import Rows
from fastguard.saliency.sums import BACKWARD, FORWARD, Sums
from fastguard.taps.taps import Scope, Site, first_tensor


def taken(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows of an activation, or those that ``index`` chooses."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if index is None else flat[index]


class _Product(torch.autograd.Function):
    """Identity on a module's output; its backward shows the output's gradient beside the input."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.take(ctx.saved_tensors[0], grads[0])
        return grads[0], None, None


class Calls(Site):
    """A forward hook that shows a module's input beside its output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook that torch calls."""
        serving = self.serving()
        if serving is None:
            return None
        scope, keep = serving
        assert isinstance(scope, Watch)
        return scope.called(self.index, first_tensor(args), output, keep)


class Watch(Scope):
    """One forward: what its places saw, and what its backward takes."""

    def __init__(self, places: Sequence[Place], sums: Sums, rows: Rows) -> None:
        super().__init__()
        self.places, self.sums, self.rows = places, sums, rows
        self.called_at: set[int] = set()
        self.taken_at: set[int] = set()
        self.tied = self._is_tied()
        self.parts: list[Tensor] = []  # of a tied weight's gradient: the head's, at the rows of each sample's tokens
        self._last: tuple[Tensor, str] | None = None

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> Tensor | None:
        """See `Scope.observe`: the embedding's output, where gradients are to come to though no weight asks for any."""
        if not self.sums.gradients or x.requires_grad:
            return None
        return x.detach().requires_grad_()

    def called(self, index: int, x: Tensor, y: Tensor, keep: bool) -> Tensor | None:
        """A place's module has run."""
        place = self.places[index]
        if keep:
            if index in self.called_at:
                raise RuntimeError(
                    f"saliency: the module of {place.name} ran twice in a forward; the gradient of such a weight is a "
                    "sum of both, which is not scored. Leave it out with modules="
                )
            self.called_at.add(index)
            if place.kind not in (HEAD, EMBEDDING):
                self._input(place, x)
        if not self.sums.gradients:
            return None
        replaced: Tensor = _Product.apply(y, x.detach(), lambda x, g: self._take(index, place, x, g))
        return replaced

    def _input(self, place: Place, x: Tensor) -> None:
        """Take the statistics of an input; that of several maps, such as the three of an attention, once."""
        kinds = [kind for kind in FORWARD if kind in self.sums.statistics]
        if not kinds:
            return
        first = self._last[1] if self._last is not None and self._last[0] is x else place.name
        if self.sums.inputs.setdefault(place.name, first) != first:
            raise RuntimeError(f"saliency: {place.name} shares its input with other maps than in the batch before")
        if first != place.name:
            return
        self._last = x, place.name
        bounds, index = self.rows.of(x, place.name, gradient=False)
        flat, width = taken(x.detach(), index), x.shape[-1]
        for kind in kinds:
            shape, op = ((width,), column_norms_) if kind == "wanda" else ((width, width), gram_)

            def fill(sums: dict[str, Tensor], kind: str = kind, op: Callable[..., None] = op) -> None:
                op(sums[kind], flat, bounds=bounds)

            self.sums.into(place, [kind], shape, x, fill)

    def _take(self, index: int, place: Place, x: Tensor, g: Tensor) -> None:
        """Take the statistics of a weight's gradient, out of the gradient of its output."""
        self.taken_at.add(index)
        if place.kind == EMBEDDING:
            self._embedding(place, x, g)
            return
        bounds, compact = self.rows.of(g, place.name)
        g, x = taken(g, compact), taken(x, compact).to(g.dtype)
        if place.kind == HEAD and self.tied:
            self._head_part(x, g, bounds)

        def fill(sums: dict[str, Tensor]) -> None:
            of = {argument: sums.get(kind) for kind, argument in BACKWARD.items()}
            abs_weight_grad_(of["score"], g, x, bounds=bounds, squared=of["squared"], signed=of["signed"])

        self.sums.into(place, self.sums.gradients, (g.shape[-1], x.shape[-1]), g, fill)

    def _tokens(self, sample: int) -> tuple[Tensor, Tensor, Tensor]:
        """A sample's positions, its distinct tokens [U], and which of them stands at each position."""
        begin, end = self.rows.attended[0][sample].tolist()
        index = self.rows.attended[1]
        at = torch.arange(begin, end, device=self.rows.device) if index is None else index[begin:end]
        distinct, which = self.rows.ids.reshape(-1)[at].unique(return_inverse=True)
        return at, distinct, which

    def _head_part(self, x: Tensor, g: Tensor, bounds: Tensor) -> None:
        """What the head adds to the rows of a tied weight that the embedding adds to as well, sample by sample."""
        for sample, (begin, end) in enumerate(bounds.tolist()):
            columns = self._tokens(sample)[1]
            wide = accumulation_dtype(g.dtype)
            self.parts.append(g[begin:end, columns].to(wide).T @ x[begin:end].to(wide))

    def _embedding(self, place: Place, ids: Tensor, g: Tensor) -> None:
        """Per-sample gradients of an embedding: of the rows of a sample's tokens alone."""
        flat = g.reshape(-1, g.shape[-1])
        scale = float(getattr(place.module, "embed_scale", 1.0))  # Gemma's embeddings multiply by it

        def fill(sums: dict[str, Tensor]) -> None:
            for sample in range(self.rows.ids.shape[0]):
                at, distinct, which = self._tokens(sample)
                wide = accumulation_dtype(g.dtype)
                own = torch.zeros(len(distinct), g.shape[-1], dtype=wide, device=g.device)
                own.index_add_(0, which, flat[at].to(wide), alpha=scale)
                before = self.parts[sample] if self.tied else torch.zeros_like(own)
                more = {"snip": (own + before).abs() - before.abs(), "fisher": (own + before) ** 2 - before**2,
                        "signed": own}  # fmt: skip
                for kind, into in sums.items():
                    into.index_add_(0, distinct, more[kind])

        self.sums.into(place, self.sums.gradients, place.shape, g, fill)

    def _is_tied(self) -> bool:
        names = [place.name for place in self.places if place.kind in (HEAD, EMBEDDING)]
        return len(names) == 2 and names[0] == names[1]

    def check_forward(self) -> None:
        """Raise a RuntimeError that names a place whose module did not run."""
        self._check(self.called_at, "did not run in the forward (is it compiled on its own, or an expert?)")

    def check_backward(self) -> None:
        """Raise a RuntimeError that names a place to which no gradient came."""
        self._check(self.taken_at, "was not reached by the backward")

    def _check(self, seen: set[int], what: str) -> None:
        missing = [place.name for index, place in enumerate(self.places) if index not in seen]
        if missing:
            raise RuntimeError(
                f"saliency: {missing[0]}{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''} {what}; leave "
                "it out with modules="
            )

    def end(self) -> None:
        """See `Scope.end`."""
        self._last = None

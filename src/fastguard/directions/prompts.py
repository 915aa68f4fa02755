"""Forwards over prompts that end where the last layer that is wanted begins: without the head, often without a layer.

Positions are counted from the end of each prompt, -1 its last token, whichever side the padding is on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.taps import Structure, Taps
from fastguard.taps.structure import compiled, reshard
from fastguard.taps.taps import Scope

Batch = Mapping[str, Tensor]
Look = Callable[[int, Tensor], None]
"""What is called with the number of a layer and its input at the wanted positions, [B, P, D]; L is the last output."""


class _Enough(Exception):
    """Raised in a forward of which nothing more is needed."""


class _Looking(Scope):
    """Gathers rows at positions [B, P] from each site, and hands them on."""

    def __init__(self, at: Tensor, look: Look, last: int, stop: bool, start: tuple[int, Tensor] | None) -> None:
        super().__init__()
        self.grad_enabled = False
        self.at, self.look, self.last, self.stop, self.seen, self.start = at, look, last, stop, 0, start

    def observe(self, kind: str, index: int, x: Tensor, keep: bool) -> Tensor | None:
        if self.start is not None and index <= self.start[0]:
            return self.start[1].to(x.device) if index == self.start[0] else None
        if index > self.last:
            return None
        at = self.at.to(x.device)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        self.look(index, x[rows, at])
        self.seen += 1
        if self.stop and index == self.last:
            raise _Enough
        return None

    def end(self) -> None:
        pass


def _pass_by(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def put_back(layer: nn.Module, forward: Any) -> None:
    """Make ``forward`` the layer's own again; None: its class's."""
    if forward is None:
        vars(layer).pop("forward", None)
    else:
        layer.forward = forward


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards any of the model, so that its ranks must call it together and to the end."""
    return any(hasattr(module, "unshard") for module in model.modules())


class Prompts:
    """Hooks that read the stream at each layer's input while prompts run; close when done.

    Args:
        model: as given by the user; structure: of ``find_structure(model)``.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self.sharded = sharded(model)
        self._taps = Taps(structure.model)
        self.layers = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in structure.layers]
        for index, layer in enumerate(self.layers):
            self._taps.input(layer, "hidden", index)
        self._taps.output(self.layers[-1], "hidden", len(self.layers))

    def read(
        self, batch: Batch, at: Tensor, look: Look, last: int | None = None, start: tuple[int, Tensor] | None = None
    ) -> None:
        """Run ``batch`` up to layer ``last``'s input (None: the last layer's output), showing rows ``at`` [B, P].

        A sharded model runs to its end, with the head at one position, since its ranks gather and free together.

        Args:
            start: (a layer, its input [B, T, D]): the layers before it are passed by, and nothing up to its input is
                shown. Not for sharded models.
        """
        scope = _Looking(at, look, len(self.layers) if last is None else last, not self.sharded, start)
        with contextlib.ExitStack() as stack:
            if start is not None:
                stack.enter_context(self._passed_by(start[0]))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._taps.on(scope))
            stack.enter_context(contextlib.suppress(_Enough))
            self.run(batch)
        if not scope.seen:
            raise RuntimeError("directions: the forward did not pass the model's layers, and nothing was read")

    @contextlib.contextmanager
    def _passed_by(self, layers: int) -> Iterator[None]:
        """The first ``layers`` layers return their input."""
        own = [(layer, vars(layer).get("forward")) for layer in self.layers[:layers]]
        try:
            for layer, _ in own:
                layer.forward = _pass_by
            yield
        finally:
            for layer, forward in own:
                put_back(layer, forward)

    def run(self, batch: Batch) -> Any:
        """One forward in full; the head at the last position alone, where the model can be told so."""
        options: dict[str, Any] = {}
        if "logits_to_keep" in self.structure.arguments:
            options["logits_to_keep"] = 1
        if "use_cache" in self.structure.arguments:
            options["use_cache"] = False
        mask = batch.get("attention_mask")
        if mask is not None and "position_ids" in self.structure.arguments and "position_ids" not in batch:
            options["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return (self.model if self.sharded else self.structure.model)(**inputs, **options)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._taps.close()


@contextlib.contextmanager
def reading(model: nn.Module, structure: Structure) -> Iterator[Prompts]:
    """`Prompts` in evaluation mode, uncompiled; modes, hooks and shards are put back on leaving."""
    modes = [(module, module.training) for module in structure.model.modules()]
    prompts = Prompts(model, structure)
    try:
        structure.model.eval()
        with torch.compiler.set_stance("force_eager") if compiled(model) else contextlib.nullcontext():
            yield prompts
    finally:
        prompts.close()
        for module, mode in modes:
            module.training = mode
        reshard(model)


def wanted(positions: int | Iterable[int]) -> tuple[int, ...]:
    """Positions counted from the end, ascending: n stands for -n to -1. Raises ValueError for others."""
    if isinstance(positions, bool) or (isinstance(positions, int) and positions < 1):
        raise ValueError(f"positions: expected how many from the end, at least 1, or negative ones, got {positions!r}")
    chosen = tuple(range(-positions, 0)) if isinstance(positions, int) else tuple(sorted(set(positions)))
    if not chosen or any(isinstance(p, bool) or not isinstance(p, int) or p >= 0 for p in chosen):
        raise ValueError(f"positions: expected negative integers, -1 for the last token, got {list(chosen)}")
    return chosen


def rows_at(batch: Batch, positions: tuple[int, ...], name: str) -> Tensor:
    """The columns [B, P] of each prompt's ``positions``.

    Raises ValueError where the batch, called ``name``, is none, has holes in its mask or a prompt too short.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise ValueError(f"{name}: expected batches that map input_ids to a tensor [B, T], got {type(batch).__name__}")
    ids = batch["input_ids"]
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"{name}: expected input_ids of shape [B, T], got {tuple(ids.shape)}")
    mask = batch.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    if kept.shape != ids.shape:
        raise ValueError(f"{name}: expected an attention_mask of shape {tuple(ids.shape)}, got {tuple(kept.shape)}")
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(kept, columns, -1).amax(-1)
    length = kept.sum(-1)
    first = torch.where(kept, columns, ids.shape[1]).amin(-1)
    short, holes = length < -min(positions), (length > 0) & (last - first + 1 != length)
    if short.any():
        at = int(short.nonzero()[0])
        raise ValueError(
            f"{name}: prompt {at} of a batch has {int(length[at])} tokens, fewer than the {-min(positions)} positions "
            "that are read"
        )
    if holes.any():
        raise ValueError(f"{name}: expected padding on one side, got a hole in the attention_mask of a prompt")
    return last[:, None] + 1 + torch.tensor(positions, device=ids.device)


def in_step(batches: Iterable[Batch], together: bool, device: torch.device, name: str) -> Iterator[tuple[Batch, bool]]:
    """The batches on ``device`` and whether each counts.

    together: ranks call a sharded model; those that have fewer batches repeat one, which does not count, until all
    are through.
    """
    iterator = iter(batches)
    before: Batch | None = None
    while True:
        batch = next(iterator, None)
        if together:
            some = torch.tensor([0 if batch is None else 1], device=device)
            torch.distributed.all_reduce(some, op=torch.distributed.ReduceOp.MAX)
            if not int(some):
                return
        elif batch is None:
            return
        if batch is not None:
            if not isinstance(batch, Mapping):
                raise ValueError(f"{name}: expected batches that map input_ids to [B, T], got {type(batch).__name__}")
            before = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
            yield before, True
        else:
            filler = torch.zeros(1, 1, dtype=torch.long, device=device)
            yield ({"input_ids": filler} if before is None else before), False

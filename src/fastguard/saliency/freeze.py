"""Weights that no optimizer moves: entries under a mask, for the duration of a fine-tuning.

    with freeze(model, masks):
        trainer.train()

A gradient of 0 is not enough: weight decay moves a weight without one, and so does momentum from before. So gradients
are masked where they arise, which norms and clipping then see, and after every step of a torch optimizer the frozen
entries are written back; the bits stay those of the beginning.

Wei et al. 2024 (arXiv 2402.05162, section 4.4) freeze what safety rests on and find that fine-tuning gets around it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastguard.ops.masks import apply_mask_, pack_mask, unpack_mask
from fastguard.saliency.places import clean
from fastguard.saliency.sums import local
from fastguard.taps.structure import unwrap


@contextlib.contextmanager
def freeze(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[Frozen]:
    """Hold the entries of ``model`` that ``masks`` choose while the context lasts; see `Frozen`."""
    frozen = Frozen(model, masks)
    try:
        yield frozen
    finally:
        frozen.close()


class Frozen:
    """Entries of a model's weights that stay as they are, whatever torch optimizer steps.

    Args:
        model: plain, PEFT, DDP, or FSDP2 (after ``fully_shard``).
        masks: weight -> bit-packed mask over the whole weight (see ``fastguard.pack_mask``), as `set_difference` gives
            them; LoRA factors have names as well.

    Attributes:
        count: frozen entries, of all ranks together.

    Raises ValueError that names a weight that the model has not, that is not trained, or whose mask does not fit.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        named = {clean(name): p for name, p in unwrap(model).named_parameters()}
        self._held: dict[int, tuple[nn.Parameter, Tensor, Tensor]] = {}
        self._handles: list[Any] = []
        self.count = 0
        for name, packed in masks.items():
            if name not in named:
                raise ValueError(f"masks: {name}: there is no such parameter in the model")
            parameter = named[name]
            if not parameter.requires_grad:
                raise ValueError(f"masks: {name} is not trained (requires_grad is False) and needs no mask")
            whole = unpack_mask(packed, parameter.shape).to(parameter.device)
            self.count += int(whole.sum())
            mine = shard_of(whole, parameter)
            values = local(parameter.detach())[mine]
            self._held[id(parameter)] = parameter, pack_mask(mine), values
        for parameter, mask, _ in self._held.values():

            def mask_gradient(p: Tensor, mask: Tensor = mask) -> None:
                if p.grad is not None:
                    apply_mask_(local(p.grad), mask)

            self._handles.append(parameter.register_post_accumulate_grad_hook(mask_gradient))
        self._handles.append(register_optimizer_step_post_hook(self._stepped))

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._held:
                    self._restore(parameter)

    def restore(self) -> None:
        """Write the frozen entries back: for optimizers that are not torch's, after each of their steps."""
        for parameter, _, _ in self._held.values():
            self._restore(parameter)

    @torch.no_grad()
    def _restore(self, parameter: nn.Parameter) -> None:
        _, mask, values = self._held[id(parameter)]
        here = local(parameter.detach())
        here.masked_scatter_(unpack_mask(mask, here.shape), values)

    def close(self) -> None:
        """Let them move again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def shard_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows of a tensor in the shape of a parameter, where FSDP2 shards that."""
    placed: Any = parameter
    if not hasattr(parameter, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(whole, placed.device_mesh, placed.placements))

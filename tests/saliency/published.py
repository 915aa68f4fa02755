"""The saliency scores of Wei et al. 2024 (arXiv 2402.05162), written out: one sample at a time, whole gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def samples(batches: Iterable[Mapping[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    """The samples of batches, each as a batch of one without padding."""
    for batch in batches:
        for b in range(batch["input_ids"].shape[0]):
            kept = batch["attention_mask"][b] != 0 if "attention_mask" in batch else slice(None)
            yield {name: batch[name][b][kept][None] for name in ("input_ids", "labels")}


def per_sample_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], take: Callable[[str, Tensor], None]
) -> None:
    """Show ``take`` the gradient of each weight and sample, of the mean cross-entropy of the sample's answer."""
    model.eval()
    named = dict(model.named_parameters())
    for sample in samples(batches):
        logits = model(input_ids=sample["input_ids"]).logits[0, :-1]
        loss = F.cross_entropy(logits, sample["labels"][0, 1:])
        for (name, _), grad in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            take(name, grad)


def sums(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """snip, fisher and signed sums of every parameter."""
    found: dict[str, dict[str, Tensor]] = {"snip": {}, "fisher": {}, "signed": {}}

    def take(name: str, grad: Tensor) -> None:
        for kind, value in (("snip", grad.abs()), ("fisher", grad.square()), ("signed", grad)):
            found[kind][name] = found[kind].get(name, 0) + value

    per_sample_gradients(model, batches, take)
    return found


def inputs(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], answers: bool) -> dict[str, Tensor]:
    """The inputs [tokens, I] of every linear map of the layers, of the answers' tokens or of all."""
    rows: dict[str, list[Tensor]] = {}
    chosen: Tensor
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=f"{name}.weight": rows.setdefault(name, []).append(
                args[0].flatten(0, -2)[chosen].detach()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    ]
    model.eval()
    for sample in samples(batches):
        chosen = sample["labels"][0] != -100 if answers else sample["labels"][0] == sample["labels"][0]
        model(input_ids=sample["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each) for name, each in rows.items()}

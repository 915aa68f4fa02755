"""Refusal-feature adversarial training said once more, with hooks that make their projections by hand."""

from __future__ import annotations

import contextlib

import torch
from torch import nn


def blocks(model):
    """The layers of a Llama or a GPT-2, each with its attention and its MLP."""
    if hasattr(model, "transformer"):
        return [(block, block.attn, block.mlp) for block in model.transformer.h]
    return [(block, block.self_attn, block.mlp) for block in model.model.layers]


@contextlib.contextmanager
def ablated(model, directions, chosen):
    """Each layer's direction out of its input and of what its attention and MLP write, for the chosen samples."""

    def off(layer, x):
        r = directions[layer]
        return torch.where(chosen[:, None, None], x - (x @ r)[..., None] * r, x)

    def before(layer):
        def hook(module, args, kwargs):
            return (off(layer, args[0]), *args[1:]), kwargs

        return hook

    def after(layer):
        def hook(module, args, out):
            return (off(layer, out[0]), *out[1:]) if isinstance(out, tuple) else off(layer, out)

        return hook

    handles = []
    for layer in directions:
        block, *writers = blocks(model)[layer]
        handles.append(block.register_forward_pre_hook(before(layer), with_kwargs=True))
        handles += [m.register_forward_hook(after(layer)) for m in writers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model, batch, directions, chosen):
    """Cross-entropy of the answers, and the hidden states at the last token of each prompt [L + 1, B, D]."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    states = []

    def look(module, args, kwargs):
        states.append((args[0] if args else kwargs["hidden_states"]).detach())

    # The layers' inputs as they come, before a direction is taken out of them.
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer, *_ in blocks(model)]
    try:
        with ablated(model, directions, chosen):
            logits = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    labels = batch["labels"]
    ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    last = (labels != -100).int().argmax(1) - 1
    return ce, torch.stack([s[torch.arange(len(last)), last] for s in states])


def directions_of(harmful, harmless, layers):
    """Unit differences in means; each list holds [L, B, D] of the samples that count."""
    mu = [torch.cat(each, 1).mean(1) for each in (harmful, harmless)]
    return {i: nn.functional.normalize(mu[0][i] - mu[1][i], dim=0) for i in layers}

"""Hidden states and a head that read as a language model's do: a peak, and a rest that falls as a power of the rank.

What a filtered backward costs depends on how many columns are live, so that logits of random matrices, whose rest is
flat, say nothing. A head row here is noise plus, along each of some topics' directions, the logarithm of its token's
rank in that topic's own random order of tokens. A hidden state leans on one topic and, from not at all to 10 nats, on
one token, drawn as the power law has it. Rows of a tile whose topics differ share few live columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAN = 0.5
"""The cosine of a hidden state and its topic."""

SURE = 10.0
"""Nats by which the surest row's token stands above where the power law has it."""


class Reading(NamedTuple):
    """hidden [N, D] in rows of length sqrt(D), head [V, D], target [N]: half of them the tokens that rows lean on."""

    hidden: Tensor
    head: Tensor
    target: Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def head_along(topic: Tensor, vocabulary: int, generator: torch.Generator, exponent: float) -> tuple[Tensor, Tensor]:
    """The head [V, D] of topics [K, D], and their orders [K, V] of tokens, the likeliest first."""
    width = topic.shape[1]
    head = unit(torch.randn(vocabulary, width, device=topic.device, generator=generator))
    orders = []
    for each in topic.split(1):  # one at a time: the head itself is the largest tensor there is
        rank = torch.randperm(vocabulary, device=topic.device, generator=generator)
        head.addmm_(-exponent * (1.0 + rank).log()[:, None], each, alpha=1 / (LEAN * width**0.5))
        orders.append(rank.argsort())
    return head, torch.stack(orders)


def reading(
    rows: int, width: int, vocabulary: int, generator: torch.Generator, *, topics: int = 32, exponent: float = 2.0,
    flat: int = 0,
) -> Reading:  # fmt: skip
    """Rows from certain to as flat as the power law; the first ``flat`` of every 128 lean on nothing (sinks)."""
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    topic = unit(torch.randn(topics, width, device=device, generator=generator))
    head, orders = head_along(topic, vocabulary, generator, exponent)
    own = torch.randint(0, topics, (rows,), device=device, generator=generator)
    rank = uniform(rows) ** (-1 / (exponent - 1)) - 1  # of a power law, by its inverse distribution
    token = orders[own, rank.clamp_max(vocabulary - 1).long()]
    towards = head[token]
    towards = unit(towards - (towards @ topic.t()) @ topic)
    sure = (uniform(rows, 1) * SURE / width**0.5).clamp_max(0.8)
    noise = unit(torch.randn(rows, width, device=device, generator=generator))
    hidden = LEAN * topic[own] + sure * towards + (1 - LEAN**2 - sure**2).clamp_min(0.0).sqrt() * noise
    if flat:
        sink = torch.randn(1, width, device=device, generator=generator)
        hidden = torch.where(torch.arange(rows, device=device)[:, None] % 128 < flat, sink, hidden)
    other = torch.randint(0, vocabulary, (rows,), device=device, generator=generator)
    return Reading(unit(hidden) * width**0.5, head, torch.where(uniform(rows) < 0.5, token, other))

"""From examples to token batches: prompt in the chat template, loss on the answer alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastguard.data.sets import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; ids[prompt:] is the answer, cut to the length asked for."""

    ids: tuple[int, ...]
    prompt: int


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt as a user turn, and the opening of the assistant's."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, answer_tokens: int) -> Encoded:
    """A prompt with the first ``answer_tokens`` tokens of its answer; a shorter answer ends its turn.

    Raises ValueError for an example without an answer.
    """
    if not example.answer:
        raise ValueError(f"example: no answer to train on for the prompt {example.prompt[:60]!r}")
    prompt = encode_prompt(tokenizer, example.prompt)
    answer = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    answer = [*answer, tokenizer.eos_token_id][:answer_tokens]
    return Encoded((*prompt, *answer), len(prompt))


def collate(examples: Sequence[Encoded], pad: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and labels, each [B, T] int64; labels ignore prompt and padding."""
    length = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORED)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, e in enumerate(examples):
        n = len(e.ids)
        ids[row, :n] = torch.tensor(e.ids)
        labels[row, e.prompt : n] = ids[row, e.prompt : n]
        mask[row, :n] = 1
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def collate_pairs(
    harmful: Sequence[Encoded], harmless: Sequence[Encoded], pad: int, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two batches of one shape for paired losses; row i of both starts with the same prompt."""
    for row, (bad, good) in enumerate(zip(harmful, harmless, strict=True)):
        if bad.ids[: bad.prompt] != good.ids[: good.prompt]:
            raise ValueError(f"pair {row}: the harmful and the harmless conversation have different prompts")
    both = collate([*harmful, *harmless], pad, device)
    half = len(harmful)
    return {k: v[:half] for k, v in both.items()}, {k: v[half:] for k, v in both.items()}


def endless(items: Sequence[Encoded], count: int, seed: int) -> Iterator[list[Encoded]]:
    """Batches of ``count`` items for ever: every item once, in a new order, before any comes again."""
    return ([items[i] for i in chosen] for chosen in endless_indices(len(items), count, seed))


def endless_indices(total: int, count: int, seed: int) -> Iterator[list[int]]:
    """Batches of ``count`` numbers below ``total`` for ever, without replacement within a pass."""
    if total < 1 or count < 1:
        raise ValueError(f"batches: got {total} items and a batch of {count}, expected at least one of each")
    rng = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < count:
            fresh = list(range(total))
            rng.shuffle(fresh)
            queue += fresh
        yield queue[:count]
        del queue[:count]

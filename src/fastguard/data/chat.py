"""From examples to token batches: prompt in the chat template, loss on the answer alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastguard.data.conversation import Message, Prompt, as_messages, last_turn
from fastguard.data.sets import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; ids[prompt:] is the answer, cut to the length asked for."""

    ids: tuple[int, ...]
    prompt: int


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The prompt in the tokenizer's chat template, and the opening of the assistant's turn.

    prompt: a string is a user's turn; or chat messages that end with one.
    Raises ValueError for a tokenizer without a chat template, or a conversation that the template refuses.
    """
    text = _rendered(tokenizer, as_messages(prompt), opening=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, answer_tokens: int) -> Encoded:
    """A prompt with the first ``answer_tokens`` tokens of its answer; a shorter answer ends its turn.

    Raises ValueError for an example without an answer, or as `encode_prompt` does.
    """
    if not example.answer:
        raise ValueError(f"example: no answer to train on for the prompt {last_turn(example.prompt)[:60]!r}")
    return with_answer(tokenizer, encode_prompt(tokenizer, example.prompt), example.answer, answer_tokens)


def with_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: str, answer_tokens: int | None
) -> Encoded:
    """An encoded prompt and the first ``answer_tokens`` tokens of an answer, its end of turn included; None: all."""
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    end = end_of_turn(tokenizer)
    if end is not None:
        ids.append(end)
    return Encoded((*prompt, *ids[:answer_tokens]), len(prompt))


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the padding token, else end-of-sequence. Raises ValueError where there is neither."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ValueError("tokenizer: it has neither a pad_token nor an eos_token to pad with")
    return int(token)


def is_cut(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> bool:
    """Whether an answer was longer than the tokens it was given: it then lacks its end of turn."""
    return encoded.ids[-1] != end_of_turn(tokenizer)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer: the special token that the chat template writes there, else end-of-sequence.

    They differ in some families: Gemma's turns end with <end_of_turn>, its sequences with <eos>.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return tokenizer.eos_token_id
    known = _ENDS.get(tokenizer)
    if known is None or known[0] != template:
        answer = "fastguard"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        after = _rendered(tokenizer, turns, opening=False).rpartition(answer)[2]
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        ends = (i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special)
        known = _ENDS[tokenizer] = (template, next(ends, tokenizer.eos_token_id))
    return known[1]


_ENDS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, int | None]] = weakref.WeakKeyDictionary()


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], opening: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template; expected a chat "
            "model's, or set tokenizer.chat_template"
        )
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening))
    except jinja2.TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"the chat template refuses a conversation of {roles}: {error}") from error


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

"""A collator for paired losses: one prompt, a harmful and a safe answer to it, two batches of one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import pad

from fastguard.data.chat import IGNORED, Encoded, collate_pairs, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("prompt", "harmful", "harmless")


class PairedCollator:
    """From samples {prompt, harmful, harmless} (strings) to ``{"harmful": batch, "harmless": batch}``.

    Each batch holds input_ids, attention_mask and labels, [B, T] int64, padded on the right to one length; row i
    of both starts with the same prompt, and labels are -100 on prompt and padding. Works as a ``data_collator``
    (with ``remove_unused_columns=False``), and its output unpacks into ``RepNoiseLoss``: ``loss_fn(**batch)``.

    Args:
        tokenizer: a Hugging Face tokenizer; with a chat template, prompts become a user turn.
        max_length: answers are cut so that prompt and answer fit; None for no limit.
        pad_to_multiple_of: T is a multiple of this.

    Raises:
        ValueError: a tokenizer without padding and end-of-sequence token, a sample that lacks a field or has an
            empty answer, or a prompt that leaves no room for an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, pad_to_multiple_of: int = 1
    ) -> None:
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if padding is None:
            raise ValueError("tokenizer: it has neither a pad_token nor an eos_token to pad with")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: expected at least 1, got {pad_to_multiple_of}")
        self.tokenizer, self.padding = tokenizer, padding
        self.max_length, self.pad_to_multiple_of = max_length, pad_to_multiple_of

    def __call__(self, samples: Sequence[Mapping[str, str]]) -> dict[str, dict[str, Tensor]]:
        """The two batches of these samples."""
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        pairs = [self._encode(sample, i) for i, sample in enumerate(samples)]
        harmful, harmless = collate_pairs([p[0] for p in pairs], [p[1] for p in pairs], self.padding)
        return {"harmful": self._widen(harmful), "harmless": self._widen(harmless)}

    def _encode(self, sample: Mapping[str, str], index: int) -> tuple[Encoded, Encoded]:
        for field in FIELDS:
            if not isinstance(sample.get(field), str) or not sample[field]:
                raise ValueError(f"samples[{index}][{field!r}]: expected a non-empty string, got {sample.get(field)!r}")
        if getattr(self.tokenizer, "chat_template", None):
            prompt = encode_prompt(self.tokenizer, sample["prompt"])
        else:
            prompt = list(self.tokenizer(sample["prompt"])["input_ids"])
        if self.max_length is not None and len(prompt) >= self.max_length:
            raise ValueError(
                f"samples[{index}]: its prompt has {len(prompt)} tokens and leaves no room for an answer in "
                f"max_length {self.max_length}"
            )
        return self._answer(prompt, sample["harmful"]), self._answer(prompt, sample["harmless"])

    def _answer(self, prompt: list[int], text: str) -> Encoded:
        answer = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.tokenizer.eos_token_id is not None:
            answer.append(self.tokenizer.eos_token_id)
        return Encoded((*prompt, *answer)[: self.max_length], len(prompt))

    def _widen(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = -batch["input_ids"].shape[1] % self.pad_to_multiple_of
        fill = {"input_ids": self.padding, "attention_mask": 0, "labels": IGNORED}
        return {name: pad(t, (0, missing), value=fill[name]) for name, t in batch.items()}

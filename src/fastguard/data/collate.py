"""Collators: from a trainer's samples to the batches that losses and defenses take.

A prompt is a string or chat messages that end with the user's turn; an answer is a string or an assistant's message.
A sample may bring a ``system`` prompt, for prompts without one, and ``retain``, an ordinary conversation: ``{"prompt",
"answer"}`` or chat messages that end with the assistant's turn. ``system`` holds for the sample's own prompt alone.

All batches hold input_ids, attention_mask and labels, [B, T] int64, padded on the right; labels are -100 on prompt and
padding. The collators work as a ``data_collator`` (with ``remove_unused_columns=False``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad

from fastguard.data.chat import IGNORED, Encoded, collate, collate_pairs, encode_prompt, padding, with_answer
from fastguard.data.conversation import Prompt, checked_answer, checked_prompt, kind, split_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
Sample = Mapping[str, Any]

FIELDS = ("prompt", "harmful", "harmless")
TAMPER_LOSSES = ("max_entropy", "dpo")


class ChatCollator:
    """From conversations, ``{"prompt", "answer"}`` or ``{"messages"}``, to one batch.

    For retain data, and for the sources of TAR's attackers. In ``messages`` the last turn, the assistant's, is the
    answer; only it carries loss.

    Args:
        tokenizer: a Hugging Face tokenizer; with a chat template, prompts become a user turn.
        max_length: answers are cut so that prompt and answer fit; None for no limit.
        pad_to_multiple_of: T is a multiple of this.

    Raises:
        ValueError: a tokenizer without padding and end-of-sequence token; a sample that lacks a field, has one of the
            wrong type or an empty one; chat messages and no chat template, or one that refuses them; a prompt that
            leaves no room for an answer. Samples are named by their place in the batch.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, pad_to_multiple_of: int = 1
    ) -> None:
        self.padding = padding(tokenizer)
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: expected at least 1, got {pad_to_multiple_of}")
        self.tokenizer = tokenizer
        self.max_length, self.pad_to_multiple_of = max_length, pad_to_multiple_of

    def __call__(self, samples: Sequence[Sample]) -> Any:
        """The batch of these samples."""
        _some(samples)
        return self._batch([self._conversation(sample, f"samples[{i}]") for i, sample in enumerate(samples)])

    def _conversation(self, sample: object, where: str) -> Encoded:
        """An ordinary conversation: messages, or a mapping with them, or with prompt and answer."""
        if not isinstance(sample, Mapping):
            prompt, answer = _read(where, split_conversation, sample)
        elif sample.get("messages") is not None:
            prompt, answer = _read(f"{where}['messages']", split_conversation, sample["messages"], sample.get("system"))
        else:
            prompt = _read(f"{where}['prompt']", checked_prompt, sample.get("prompt"), sample.get("system"))
            answer = _read(f"{where}['answer']", checked_answer, sample.get("answer"))
        return self._encoded(self._prompt(prompt, where), answer)

    def _prompt(self, prompt: Prompt, where: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) or not isinstance(prompt, str):
            ids = _read(where, encode_prompt, self.tokenizer, prompt)
        else:
            ids = list(self.tokenizer(prompt)["input_ids"])
        if self.max_length is not None and len(ids) >= self.max_length:
            raise ValueError(
                f"{where}: its prompt has {len(ids)} tokens and leaves no room for an answer in "
                f"max_length {self.max_length}"
            )
        return ids

    def _encoded(self, prompt: list[int], answer: str) -> Encoded:
        room = None if self.max_length is None else self.max_length - len(prompt)
        return with_answer(self.tokenizer, prompt, answer, room)

    def _batch(self, rows: Sequence[Encoded]) -> Batch:
        return self._widen(collate(rows, self.padding))

    def _widen(self, batch: Batch) -> Batch:
        missing = -batch["input_ids"].shape[1] % self.pad_to_multiple_of
        fill = {"input_ids": self.padding, "attention_mask": 0, "labels": IGNORED}
        return {name: pad(t, (0, missing), value=fill[name]) for name, t in batch.items()}


class PairedCollator(ChatCollator):
    """From samples {prompt, harmful, harmless} to ``{"harmful": batch, "harmless": batch}``, of one shape.

    Row i of both starts with the same prompt. Where the samples have a ``retain`` conversation, all of them, there is
    a third batch ``"retain"``. The output unpacks into ``RepNoiseLoss``: ``loss_fn(**batch)``.

    Arguments and errors: `ChatCollator`'s.
    """

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Batch]:
        """The two batches of these samples, or three."""
        bad, good, retain = self._rows(samples)
        harmful, harmless = collate_pairs(bad, good, self.padding)
        made = {"harmful": self._widen(harmful), "harmless": self._widen(harmless)}
        return {**made, "retain": self._batch(retain)} if retain else made

    def _rows(self, samples: Sequence[Sample]) -> tuple[list[Encoded], list[Encoded], list[Encoded]]:
        """Harmful, harmless and retain conversations, item by item; the last may be none."""
        _some(samples)
        bad, good, retain = [], [], []
        first = samples[0].get("retain") is not None
        for i, sample in enumerate(samples):
            where = f"samples[{i}]"
            for field in FIELDS:
                if sample.get(field) is None or sample[field] == "":
                    raise ValueError(f"{where}[{field!r}]: expected a non-empty string, got {sample.get(field)!r}")
            prompt = _read(f"{where}['prompt']", checked_prompt, sample["prompt"], sample.get("system"))
            ids = self._prompt(prompt, where)
            bad.append(self._encoded(ids, _read(f"{where}['harmful']", checked_answer, sample["harmful"])))
            good.append(self._encoded(ids, _read(f"{where}['harmless']", checked_answer, sample["harmless"])))
            if (sample.get("retain") is not None) != first:
                one, other = ("none", "one") if first else ("one", "none")
                raise ValueError(
                    f"{where}['retain']: expected all samples of a batch to have a conversation to retain, or none; "
                    f"this has {one}, samples[0] has {other}"
                )
            if first:
                retain.append(self._conversation(sample["retain"], f"{where}['retain']"))
        return bad, good, retain


class TamperCollator(PairedCollator):
    """From the same samples to what TAR takes besides its attackers: ``{"retain": batch, "tamper": batch}``.

    retain holds the harmless answers and, where the samples have them, the ``retain`` conversations; tamper the
    harmful answers, or for DPO ``{"chosen": batch, "rejected": batch}`` with the harmless and the harmful ones. The
    attackers' batches, of other samples, come from TAR's ``sources``, and `ChatCollator` makes them.

    Args:
        tamper_loss: as TAR's, ``max_entropy`` or ``dpo``; others: `ChatCollator`'s, as are the errors.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, pad_to_multiple_of: int = 1,
        tamper_loss: str = "max_entropy",
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, max_length, pad_to_multiple_of)
        if tamper_loss not in TAMPER_LOSSES:
            raise ValueError(f"tamper_loss: expected {' or '.join(TAMPER_LOSSES)}, got {tamper_loss!r}")
        self.tamper_loss = tamper_loss

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batches of these samples."""
        bad, good, retain = self._rows(samples)
        tamper: Any = self._batch(bad)
        if self.tamper_loss == "dpo":
            rejected, chosen = collate_pairs(bad, good, self.padding)
            tamper = {"chosen": self._widen(chosen), "rejected": self._widen(rejected)}
        return {"retain": self._batch([*good, *retain]), "tamper": tamper}


def _some(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    for i, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise ValueError(f"samples[{i}]: expected a mapping of fields, got {kind(sample)}")


def _read(where: str, read: Callable[..., Any], *values: object) -> Any:
    """``read(*values)``; what it raises is told with the field."""
    try:
        return read(*values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error

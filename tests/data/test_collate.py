"""PairedCollator on a tiny tokenizer made here."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastguard import PairedCollator, RepNoiseLoss
from tiny_models import tiny

WORDS = "[PAD] </s> user assistant how are you no sorry sure here is a b c".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}user {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, pad: str | None = "[PAD]") -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, eos_token="</s>")
    fast.chat_template = template
    return fast


SAMPLES = [
    {"prompt": "how are you", "harmful": "sure here is a b c", "harmless": "no"},
    {"prompt": "you", "harmful": "sure", "harmless": "sorry no"},
]


def text(ids: torch.Tensor) -> str:
    return " ".join(WORDS[i] for i in ids)


def test_two_batches_of_one_shape():
    batch = PairedCollator(tokenizer())(SAMPLES)
    harmful, harmless = batch["harmful"], batch["harmless"]
    assert set(harmful) == set(harmless) == {"input_ids", "attention_mask", "labels"}
    assert len({t.shape for half in batch.values() for t in half.values()}) == 1
    assert text(harmful["input_ids"][0]) == "user how are you assistant sure here is a b c </s>"
    assert text(harmless["input_ids"][0]) == "user how are you assistant no </s>" + " [PAD]" * 5
    assert text(harmful["input_ids"][1]) == "user you assistant sure </s>" + " [PAD]" * 7
    assert harmless["attention_mask"].sum(1).tolist() == [7, 6]
    expected = harmless["input_ids"].masked_fill(harmless["attention_mask"] == 0, -100)
    expected[0, :5], expected[1, :3] = -100, -100
    assert torch.equal(harmless["labels"], expected)


def test_without_template_and_without_padding_token():
    batch = PairedCollator(tokenizer(template=None, pad=None), pad_to_multiple_of=8)(SAMPLES[1:])
    assert text(batch["harmful"]["input_ids"][0]) == "you sure" + " </s>" * 6
    assert batch["harmful"]["attention_mask"].sum() == 3
    assert (batch["harmful"]["labels"] != -100).sum() == 2


def test_max_length_cuts_answers_and_refuses_long_prompts():
    batch = PairedCollator(tokenizer(), max_length=7)(SAMPLES)
    assert text(batch["harmful"]["input_ids"][0]) == "user how are you assistant sure here"
    with pytest.raises(ValueError, match=r"samples\[0\]: its prompt has 5 tokens"):
        PairedCollator(tokenizer(), max_length=5)(SAMPLES)


def test_what_it_refuses():
    collate = PairedCollator(tokenizer())
    with pytest.raises(ValueError, match="samples: expected at least one"):
        collate([])
    with pytest.raises(ValueError, match=r"samples\[0\]\['harmless'\]: expected a non-empty string, got None"):
        collate([{"prompt": "you", "harmful": "sure"}])
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        PairedCollator(tokenizer(), pad_to_multiple_of=0)
    bare = tokenizer(pad=None)
    bare.eos_token = None
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        PairedCollator(bare)


def test_unpacks_into_the_loss():
    loss_fn = RepNoiseLoss(tiny("llama"), mask_padding=True)
    loss = loss_fn(**PairedCollator(tokenizer())(SAMPLES))
    loss.backward()
    assert torch.isfinite(loss)

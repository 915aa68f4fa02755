"""PairedCollator on a tiny tokenizer made here."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastguard import PairedCollator, RepNoiseLoss
from fastguard.data.collate import ChatCollator, TamperCollator
from fastguard.defenses.tar.step import TAR
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


ROLES = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def said(role, content):
    return {"role": role, "content": content}


TURNS = [said("user", "you"), said("assistant", "sorry"), said("user", "how are you")]
RETAIN = [[said("user", "are you"), said("assistant", "here")], {"prompt": "b", "answer": "c c c"}]


def test_chat_messages_and_system_prompts():
    """[PAD] stands for words that the tokenizer does not know, such as `system`."""
    samples = [
        {"prompt": TURNS, "harmful": said("assistant", "sure"), "harmless": [said("assistant", "no")], "system": "a b"},
        {"prompt": "you", "harmful": "sure", "harmless": "no", "system": "c"},
        {"prompt": "you", "harmful": "sure", "harmless": "no", "system": None},
    ]
    batch = PairedCollator(tokenizer(ROLES))(samples)
    rows = [
        text(ids[mask == 1]) for ids, mask in zip(batch["harmful"]["input_ids"], batch["harmful"]["attention_mask"])
    ]
    assert rows == [
        "[PAD] a b </s> user you </s> assistant sorry </s> user how are you </s> assistant sure </s>",
        "[PAD] c </s> user you </s> assistant sure </s>",
        "user you </s> assistant sure </s>",
    ]
    ids, labels = batch["harmless"]["input_ids"], batch["harmless"]["labels"]
    assert [text(i[row != -100]) for i, row in zip(ids, labels)] == ["no </s>"] * 3


def test_one_dataset_yields_pairs_and_retain_data():
    samples = [{**sample, "retain": retain} for sample, retain in zip(SAMPLES, RETAIN)]
    batch = PairedCollator(tokenizer(ROLES), pad_to_multiple_of=4)(samples)
    assert list(batch) == ["harmful", "harmless", "retain"]
    ids, labels = batch["retain"]["input_ids"], batch["retain"]["labels"]
    assert [text(i[row != -100]) for i, row in zip(ids, labels)] == ["here </s>", "c c c </s>"]
    assert ids.shape[1] % 4 == 0
    for name in ("harmful", "harmless"):
        assert torch.equal(batch[name]["labels"], PairedCollator(tokenizer(ROLES), None, 4)(SAMPLES)[name]["labels"])
    assert torch.equal(ids, ChatCollator(tokenizer(ROLES), pad_to_multiple_of=4)(
        [{"messages": RETAIN[0]}, RETAIN[1]])["input_ids"])  # fmt: skip
    loss_fn = RepNoiseLoss(tiny("llama"), mask_padding=True, retain_weight=1.0)
    loss_fn(**batch).backward()
    assert "retain_ce" in loss_fn.components


def test_a_tamper_batch_for_entropy_and_for_preferences():
    samples = [{**sample, "retain": retain} for sample, retain in zip(SAMPLES, RETAIN)]
    pairs = PairedCollator(tokenizer(ROLES))(SAMPLES)
    made = TamperCollator(tokenizer(ROLES))(samples)
    assert set(made) == {"retain", "tamper"}
    ids, labels = made["retain"]["input_ids"], made["retain"]["labels"]
    assert [text(i[row != -100]) for i, row in zip(ids, labels)] == [
        "no </s>", "sorry no </s>", "here </s>", "c c c </s>"
    ]  # fmt: skip
    assert torch.equal(made["tamper"]["input_ids"], pairs["harmful"]["input_ids"])
    dpo = TamperCollator(tokenizer(ROLES), tamper_loss="dpo")(SAMPLES)
    assert dpo["retain"]["input_ids"].shape[0] == 2
    for ours, theirs in (("chosen", "harmless"), ("rejected", "harmful")):
        assert all(torch.equal(dpo["tamper"][ours][key], pairs[theirs][key]) for key in pairs[theirs])
    with pytest.raises(ValueError, match="tamper_loss: expected max_entropy or dpo, got 'mmd'"):
        TamperCollator(tokenizer(ROLES), tamper_loss="mmd")


@pytest.mark.parametrize("kind", ["max_entropy", "dpo"])
def test_tar_takes_what_the_collators_make(kind):
    tar = TAR(tiny("llama"), steps=2, every=1, lrs=(1e-3,), tamper_loss=kind)
    attacker = ChatCollator(tokenizer())
    sources = {"harmful": lambda n: attacker([{"prompt": "you", "answer": "sure"}]),
               "retain": lambda n: attacker(RETAIN[1:])}  # fmt: skip
    batch = TamperCollator(tokenizer(), tamper_loss=kind)(SAMPLES)
    figures = tar.backward(**batch, adversaries=tar.adversaries(sources))
    assert torch.isfinite(figures["loss"]) and torch.isfinite(figures["tamper"])
    tar.close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            {"prompt": [said("user", "you"), said("bot", "you")]},
            r"samples\[1\]\['prompt'\]: message 1: expected a role",
        ),
        ({"prompt": 7}, r"samples\[1\]\['prompt'\]: expected a string or a list of messages, got int"),
        ({"harmful": said("user", "you")}, r"samples\[1\]\['harmful'\]: expected one assistant's message, got user"),
        ({"harmless": 7}, r"samples\[1\]\['harmless'\]: expected a string or an assistant's message, got int"),
        ({"retain": None}, r"samples\[1\]\['retain'\]: expected all samples .* this has none, samples\[0\] has one"),
        ({"retain": {"prompt": "you"}}, r"samples\[1\]\['retain'\]\['answer'\]: expected a string .*, got null"),
        ({"retain": [said("user", "you")]}, r"samples\[1\]\['retain'\]: expected a conversation that ends"),
        ({"retain": "you"}, r"samples\[1\]\['retain'\]: expected a list of messages, got a string"),
    ],
)
def test_errors_name_sample_and_field(change, error):
    samples = [{**sample, "retain": retain} for sample, retain in zip(SAMPLES, RETAIN)]
    samples[1] = {**samples[1], **change}
    with pytest.raises(ValueError, match=error):
        PairedCollator(tokenizer())(samples)


def test_messages_need_a_chat_template_and_samples_are_mappings():
    with pytest.raises(ValueError, match=r"samples\[0\]: tokenizer: .* has no chat template"):
        PairedCollator(tokenizer(template=None))([{**SAMPLES[0], "prompt": TURNS}])
    with pytest.raises(ValueError, match=r"samples\[0\]: tokenizer: .* has no chat template"):
        PairedCollator(tokenizer(template=None))([{**SAMPLES[0], "system": "a"}])
    with pytest.raises(ValueError, match=r"samples\[0\]: expected a mapping of fields, got a string"):
        ChatCollator(tokenizer())(["you"])
    with pytest.raises(
        ValueError, match=r"samples\[0\]\['prompt'\]: expected a string or a list of messages, got null"
    ):
        ChatCollator(tokenizer())([{"answer": "you"}])

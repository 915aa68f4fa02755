import pytest
import torch

import tiny
from fastguard.data.chat import IGNORED, collate, collate_pairs, encode, encode_prompt
from fastguard.data.sets import Example


def test_loss_is_on_the_answer_alone_and_a_short_answer_ends_its_turn():
    tokenizer = tiny.tokenizer()
    e = encode(tokenizer, Example("hi", "yes"), answer_tokens=16)
    assert tokenizer.decode(e.ids[: e.prompt]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(e.ids[e.prompt :]) == "yes<|im_end|>"
    assert list(e.ids[: e.prompt]) == encode_prompt(tokenizer, "hi")
    assert len(encode(tokenizer, Example("hi", "yes" * 30), 16).ids) == e.prompt + 16
    batch = collate([e, encode(tokenizer, Example("hello", "y"), 16)], pad=1)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    row = batch["labels"][0]
    assert row[row != IGNORED].tolist() == list(e.ids[e.prompt :])
    assert int(batch["attention_mask"][0].sum()) == len(e.ids)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_an_example_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="no answer"):
        encode(tiny.tokenizer(), Example("hi"), 4)


def test_pairs_have_one_shape_and_one_prompt():
    tokenizer = tiny.tokenizer()
    bad = [encode(tokenizer, Example("hi", "long answer"), 16)]
    good = [encode(tokenizer, Example("hi", "no"), 16)]
    a, b = collate_pairs(bad, good, pad=1)
    assert a["input_ids"].shape == b["input_ids"].shape
    assert torch.equal(a["input_ids"][0, : bad[0].prompt], b["input_ids"][0, : good[0].prompt])
    with pytest.raises(ValueError, match="pair 0"):
        collate_pairs(bad, [encode(tokenizer, Example("ho", "no"), 16)], pad=1)

"""The packaged sets: divided and encoded as ever; what is said when they do not suffice."""

import hashlib
import json
import random
import string

import pytest

import tiny
from fastguard.data import corpus, sets
from fastguard.data.parts import Corpus
from fastguard.run.config import DataConfig

SIZES = {
    "harmful_align": 4, "harmful_immunize": 4, "harmful_attack": 4, "harmful_measure": 3, "harmless_align": 4,
    "harmless_immunize": 4, "harmless_measure": 3, "edgy_measure": 2, "benign_train": 4, "benign_measure": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """Sets of forty prompts; some are long, some near-duplicates."""
    for name, answer in (("advbench", ""), ("alpaca", "fine, thank you"), ("edgy", ""), ("commonsense", "A. it")):
        rng = random.Random(name)
        words = ["".join(rng.choices(string.ascii_lowercase, k=7)) for _ in range(60)]
        prompts = [f"{name} {a} {b}" for a, b in zip(words[::2], words[1::2], strict=True)]
        prompts += [f"{p} and very much more of it, to make it too long" for p in prompts[:5]]
        prompts += [f"{name} some {p.split(maxsplit=1)[1]}" for p in prompts[5:10]]
        data = sets.DataSet(tuple(sets.Example(p, answer) for p in prompts), f"made up: {name}", "none")
        monkeypatch.setattr(sets, name, lambda data=data: data)


def digest(c: Corpus) -> str:
    def ids(rows):
        return [(list(e.ids), e.prompt) for e in rows]

    made = [{part: ids(rows) for part, rows in one.items()} for one in (c.harmful, c.safe, c.harmless)]
    made += [ids(c.benign_train), ids(c.benign_measure), ids(c.perplexity(9)), c.requests, c.instructions, c.edgy]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def test_the_packaged_sets_are_divided_and_encoded_as_before_own_sets_were_possible():
    made = corpus.build_corpus(tiny.tokenizer(), DataConfig(seed=3, prompt_tokens=40, **SIZES))
    assert digest(made) == "f681cd3402cba04999ecf5eb42929e0e4d1efce98be329223a249658149df2c4"
    assert made.sources["harmful"]["rows"] == 40 and made.sources["harmful"]["dropped"] == {"prompt too long": 5}
    assert made.sources["harmful"]["cut"] > 0 and made.notes == []


def test_too_long_prompts_are_named_with_the_key_that_drops_them():
    with pytest.raises(ValueError, match=r"benign: .*Of its 40 prompts 40 are longer than data.benign_prompt_tokens "
                                         r"allows \(8 tokens\)"):  # fmt: skip
        corpus.build_corpus(tiny.tokenizer(), DataConfig(prompt_tokens=40, benign_prompt_tokens=8, **SIZES))
    with pytest.raises(ValueError, match=r"harmful: .*data.prompt_tokens allows \(16 tokens\)"):
        corpus.build_corpus(tiny.tokenizer(), DataConfig(**SIZES))

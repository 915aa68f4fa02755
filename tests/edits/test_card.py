"""A model's card after an edit: its own text, front matter with what was added, a section on what was done."""

import pytest
import yaml

from fastguard.edits.card import extended

RECORD = {
    "fastguard": "1", "source": "lab/chat-7b",
    "beside": {"base": "lab/base-7b", "again": "lab/chat-7b", "here": "/a/b"},
    "edit": {"name": "ties", "options": {"density": 0.3, "models": [{"weight": 1.0}]}, "tensors": ["a", "b"]},
    "shards": {"1": {"sha256": "ab" * 32, "beside": {"base": "cd" * 32, "again": "ef" * 32, "here": "01" * 32}},
               "2": {"sha256": "23" * 32, "beside": {"base": "45" * 32, "again": "67" * 32, "here": "89" * 32}}},
}  # fmt: skip


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_new_card_names_what_it_was_made_of():
    card = extended("", RECORD, ["merge"])
    assert front(card) == {
        "base_model": ["lab/chat-7b", "lab/base-7b"], "base_model_relation": "merge", "tags": ["merge"]
    }  # fmt: skip
    for said in ("## ties", "2 tensors", "density: `0.3`", '`[{"weight": 1.0}]`', "| here | `/a/b` |", "cdcdcdcdcdcd",
                 "454545454545", "232323232323"):  # fmt: skip
        assert said in card, said


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_card_keeps_its_text_and_its_entries(ending):
    body = "# Chat\n\n---\n\nA rule above, *words* as they were.\n\n    code\n"
    given = f"---\nlicense: mit\ntags: [chat, merge]\nbase_model: lab/old\n---\n\n{body}".replace("\n", ending)
    card = extended(given, RECORD, ["merge"])
    assert front(card) == {
        "license": "mit", "tags": ["chat", "merge"], "base_model": ["lab/chat-7b", "lab/base-7b"],
        "base_model_relation": "merge",
    }  # fmt: skip
    assert body.strip().replace("\n", ending) in card and card.index("# Chat") < card.index("## ties")


@pytest.mark.parametrize(
    "text", ["---\nno mapping\n---\nwords", "---\n[: bad\n---\nwords", "---\nan unclosed rule", "words"]
)
def test_what_is_no_front_matter_is_text(text):
    card = extended(text, RECORD, ["merge"])
    assert text in card and front(card)["tags"] == ["merge"]


def test_folders_of_this_disk_are_no_base_model():
    alone = {**RECORD, "source": "/models/mine", "beside": {}}
    assert front(extended("---\nbase_model: lab/old\ntags: chat\n---\nwords", alone, ["merge"])) == {
        "base_model": "lab/old", "tags": ["chat", "merge"]
    }  # fmt: skip

"""A run of a few seconds for the tests of this folder."""

import random
import string

import pytest

import tiny
from fastguard.data import sets
from fastguard.run import config as configuration


def fake_set(kind, answer):
    """Forty prompts of two words that no other prompt has."""
    rng = random.Random(kind)
    words = ["".join(rng.choices(string.ascii_lowercase, k=7)) for _ in range(80)]
    prompts = [f"{kind} {a} {b}" for a, b in zip(words[::2], words[1::2], strict=True)]
    return lambda: sets.DataSet(tuple(sets.Example(p, answer) for p in prompts), f"made up: {kind}", "none")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A configuration of a few seconds, on made-up sets."""
    for name, answer in (("advbench", ""), ("alpaca", "fine"), ("edgy", ""), ("commonsense", "A. it")):
        monkeypatch.setattr(sets, name, fake_set(name[:4], answer))
    return configuration.from_dict(
        {
            "model": {"name": str(tiny.folder(tmp_path / "base"))},
            "data": {
                "prompt_tokens": 60, "harmful_align": 4, "harmful_immunize": 4, "harmful_attack": 4,
                "harmful_measure": 3, "harmless_align": 4, "harmless_immunize": 4, "harmless_measure": 3,
                "edgy_measure": 2, "benign_train": 4, "benign_measure": 3,
            },
            "align": {"steps": 2, "refusals": 2, "harmless": 1},
            "immunize": {"steps": 2, "pairs": 2, "retain": 2, "settle_steps": 1, "options": {"layers": 2}},
            "attack": {"batch": 2, "scored_steps": [0, 1, 2], "lr": [1e-4, 1e-3]},
            "evaluate": {"score_tokens": 3, "sample_tokens": 3, "samples": 1,
                         "benign_batch": 2, "benign_steps": [0, 1]},
            "variants": {"no noise": {"options": {"beta": 0.0}}},
        }
    )  # fmt: skip

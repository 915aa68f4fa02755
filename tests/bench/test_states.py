"""Recorded hidden states are what the head reads, and a file of something else is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from fastguard.bench import states
from fastguard.bench.shapes import REHEARSAL


def test_the_last_recorded_state_gives_the_models_logits(tmp_path):
    where, text, out = tiny.folder(tmp_path / "model"), tmp_path / "text", tmp_path / "out.safetensors"
    text.write_text("Some words of a text, each byte of which is a token.")
    states.record(str(where), text, out, 20)
    found, model = load_file(out), tiny.model().bfloat16()
    ids = torch.tensor(tiny.tokenizer()(text.read_text())["input_ids"])
    want = model(ids[None, :20]).logits[0].detach()
    assert found["hidden"].shape == (3, 20, 32) and torch.equal(found["target"], ids[1:21])
    assert torch.allclose(found["hidden"][-1] @ found["weight"].t(), want, atol=0.05 * float(want.abs().max()))
    work = states.group(out).prepare(REHEARSAL)("fastguard, state 1")
    assert work.run()[1].shape == found["weight"].shape and 0 < work.figures["live"] <= 1
    with pytest.raises(ValueError, match="text: expected more than 100 tokens, got 52"):
        states.record(str(where), text, out, 100)
    save_file({key: found[key] for key in ("hidden", "weight")}, out)
    with pytest.raises(ValueError, match=r"states: .* expected hidden .* and target"):
        states.group(out)

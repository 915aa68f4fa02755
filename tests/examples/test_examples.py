"""The examples run, as their first lines say, and a run that is killed goes on to the same bits."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def run(*command: object, timeout: float = 300) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("defense", "saves"), [("repnoise", "background"), ("tar", "save")])
def test_a_killed_run_goes_on_to_the_same_bits(defense, saves, tmp_path):
    """SIGKILL in the middle of a step, and at every stage of a save; two processes, torch.distributed.checkpoint."""
    script = Path(__file__).with_name("lives.py")
    lives = runpy.run_path(str(script))["LIVES"]  # other packages bring an `examples` of their own
    printed = run(sys.executable, script, tmp_path, defense, saves).splitlines()
    assert [line for line in printed if line.startswith("killed: ")] == [f"killed: {f.__name__}" for f, _ in lives]
    assert printed[-1] == "bit-equal"


@pytest.mark.slow
def test_fsdp2_by_torchrun(tmp_path):
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, EXAMPLES / "fsdp2.py", "--out", tmp_path]
    printed = run(*command, "--steps", 2, "--defense", "t_vaccine")
    assert [line.split(":")[0] for line in printed.splitlines()] == ["step 1", "step 2"]
    assert (tmp_path / "latest").read_text() == "step-00000002"


def test_accelerate_loop(tmp_path):
    command = [sys.executable, EXAMPLES / "accelerate_loop.py", "--out", tmp_path, "--defense", "vaccine"]
    assert len(run(*command, "--steps", 2).splitlines()) == 2
    assert len(run(*command, "--steps", 3).splitlines()) == 1


def test_trainer(tmp_path):
    printed = run(sys.executable, EXAMPLES / "trainer.py", "--out", tmp_path, "--steps", 2, "--defense", "booster")
    assert "'train_loss'" in printed
    assert (tmp_path / "checkpoint-2" / "fastguard_state.pt").exists()


def test_directions(tmp_path):
    from fastguard.edits.basis import read_basis

    out = tmp_path / "direction.safetensors"
    printed = run(sys.executable, EXAMPLES / "directions.py", "--out", out)
    before, after = (float(part) for part in printed.split("at the end: ")[1].split(", ablated "))
    assert before > 1e-2 and after < 1e-5 * before and read_basis(out).shape == (1, 32)
    assert printed.startswith("separation by layer: ")


def test_directions_of_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    from directions import chat

    model, sets = chat.folder(tmp_path / "model"), {}
    for name, words in (("harmful", chat.BAD), ("harmless", chat.GOOD)):
        sets[name] = tmp_path / f"{name}.txt"
        sets[name].write_text("\n".join(chat.prompts(words, 48)))
    monkeypatch.syspath_prepend(EXAMPLES)
    given = ["--model", model, "--harmful", sets["harmful"], "--harmless", sets["harmless"]]
    given += ["--refusal-token", chat.SORRY, "--out", tmp_path / "direction.safetensors"]
    runpy.run_path(str(EXAMPLES / "directions.py"))["main"]([str(part) for part in given])
    line = capsys.readouterr().out.split("refusal score ")[1].splitlines()[0]
    score, without = map(float, line.split(", without the direction "))
    assert score > 5 and without < 0


def test_a_model_and_data_of_ones_own_in_trl(tmp_path):
    """A saved model with its tokenizer, and a JSONL of pairs."""
    pytest.importorskip("trl")
    import json

    from tiny import folder

    folder(tmp_path / "model")
    texts = [{"prompt": f"request {i}", "harmful": f"placeholder {i}", "harmless": f"refusal {i}"} for i in range(6)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, texts)))
    printed = run(
        sys.executable, EXAMPLES / "trainer.py", "--model", tmp_path / "model", "--data", data, "--out",
        tmp_path / "out", "--steps", 2, "--defense", "repnoise", "--trl",
    )  # fmt: skip
    assert "'train_loss'" in printed


def test_saliency(tmp_path):
    """One process and two find the same."""
    command = EXAMPLES / "parameter_saliency.py", "--out", tmp_path / "scores"
    alone = run(sys.executable, *command)
    assert alone.startswith("16 safety and 16 utility samples: ") and alone.endswith("were pruned\n")
    assert (tmp_path / "scores" / "safety" / "saliency.safetensors").is_file()
    assert run(BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *command) == alone


def test_saliency_of_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    import json

    from directions import chat

    model, sets = chat.folder(tmp_path / "model"), {}
    for name, words, answer in (("safety", chat.BAD, "sorry g1"), ("utility", chat.GOOD, "g1 g2")):
        sets[name] = tmp_path / f"{name}.jsonl"
        rows = [json.dumps({"prompt": p, "answer": answer}) for p in chat.prompts(words, 12)]
        sets[name].write_text("\n".join(rows))
    monkeypatch.syspath_prepend(EXAMPLES)
    given = ["--model", model, "--safety", sets["safety"], "--utility", sets["utility"], "--out", tmp_path / "scores"]
    runpy.run_path(str(EXAMPLES / "parameter_saliency.py"))["main"]([str(part) for part in given])
    assert capsys.readouterr().out.startswith("12 safety and 12 utility samples: ")

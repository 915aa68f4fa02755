"""The configuration and the launch script for 70B, with a tiny model on two processes."""

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from fastguard.data.sets import placeholder, refusal
from fastguard.run import config

EXAMPLE = Path(__file__).parents[2] / "examples" / "70b"


def prompts(kind, count):
    """Of two words each that no other has."""
    rng = random.Random(kind)
    return [
        f"{kind} " + " ".join("".join(rng.choices(string.ascii_lowercase, k=7)) for _ in "ab") for _ in range(count)
    ]


def test_the_configuration_is_one():
    found = config.load(EXAMPLE / "config.yaml")
    assert found.immunize.method == "tar" and not found.align.run
    batches = {found.immunize.pairs, found.immunize.retain, found.attack.batch, found.evaluate.benign_batch}
    batches |= {found.immunize.options["batch"], found.immunize.options["held_out"]}
    assert min(batches) >= 64  # a sample for each of 64 GPUs


@pytest.mark.slow
def test_the_launch_script_runs_it_with_a_tiny_model(tmp_path):
    rows = prompts("do", 48)
    pairs = [{"prompt": r, "harmful": placeholder(r, i), "harmless": refusal(i)} for i, r in enumerate(rows)]
    retain = [{"prompt": r, "answer": r[-7:]} for r in prompts("say", 60)]
    for name, found in (("pairs", pairs), ("retain", retain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    tree = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    tree["model"] = {"name": str(tiny.folder(tmp_path / "model")), "dtype": "float32"}
    tree["data"]["own"]["retain_parts"]["measure"] = 10
    tree["immunize"] |= {"steps": 1, "pairs": 2, "retain": 2}
    tree["immunize"]["options"] |= {"inner_steps": 2, "read_every": 1, "batch": 2, "held_out": 2}
    tree["attack"] |= {"batch": 2, "scored_steps": [0, 1]}
    tree["evaluate"] = {"benign_batch": 2, "score_tokens": 3, "sample_tokens": 3, "samples": 1, "benign_steps": [0, 1]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    ran = subprocess.run(
        ["bash", str(EXAMPLE / "torchrun.sh"), str(tmp_path / "config.yaml"), str(tmp_path / "run")],
        env={**os.environ, "GPUS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PORT": "0"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-6000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(metrics["models"]) == ["aligned", "immunized"] and (tmp_path / "run" / "report.html").is_file()
    assert metrics["models"]["immunized"]["training"]["steps"] == 1
    assert metrics["environment"]["device"] == "cpu, 2 processes"


def test_the_slurm_script_asks_for_a_signal_before_its_end_and_is_a_script():
    text = (EXAMPLE / "slurm.sh").read_text()
    assert "--signal=TERM@300" in text and 'fastguard immunize "$1" --out "$2"' in text
    for script in EXAMPLE.glob("*.sh"):
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0

"""A package of somebody else's registers a defense: it then has a configuration, commands, a plan and a mixin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny

pytestmark = pytest.mark.slow

SMALL = {
    "model": {"name": "base"},
    "data": {
        "prompt_tokens": 70, "harmful_align": 4, "harmful_immunize": 4, "harmful_attack": 4, "harmful_measure": 3,
        "harmless_align": 4, "harmless_immunize": 4, "harmless_measure": 3, "edgy_measure": 2, "benign_train": 4,
        "benign_measure": 3, "benign_prompt_tokens": 300,
    },
    "align": {"steps": 1},
    "immunize": {"method": "gradient_ascent", "steps": 2, "pairs": 2, "retain": 2, "options": {"weight": 0.2}},
    "attack": {"batch": 2, "scored_steps": [0, 1]},
    "evaluate": {"score_tokens": 2, "samples": 0, "benign_steps": []},
}  # fmt: skip

MIXIN = """
import common, trainer
made = trainer.main(["--out", "trained", "--steps", "2", "--defense", "gradient_ascent", "--set", "weight=0.3"])
assert made.method.weight == 0.3 and made.method.step == 4
print(sorted(made.state.log_history[0]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that it was installed into, and a way to run a command where it is found."""
    here = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(Path(__file__).with_name("outside"), here / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", here / "site", source], check=True)
    tiny.folder(here / "base")
    (here / "small.yaml").write_text(yaml.safe_dump(SMALL))
    examples = Path(__file__).parents[2] / "examples"
    paths = os.pathsep.join(map(str, [here / "site", examples, *filter(None, [os.environ.get("PYTHONPATH")])]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=here, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return here, run


def test_it_is_immunized_with_from_the_command_line(installed):
    here, run = installed
    said = run("-m", "fastguard.cli", "immunize", "small.yaml", "--out", "run")
    assert "immunized" in said and (here / "run" / "immunized" / "model.safetensors").is_file()
    metrics = json.loads((here / "run" / "metrics.json").read_text())
    made = metrics["models"]["immunized"]
    assert made["label"] == "immunized (Gradient ascent)" and "weight 0.2" in made["training"]["method"]
    assert {"harmful_ce", "harmless_ce"} <= made["training"]["curve"][0].keys()

    run("-m", "fastguard.cli", "attack", "ours=run/immunized", "base", "--method", "lora", "--config", "small.yaml",
        "--out", "attacked")  # fmt: skip
    attacked = json.loads((here / "attacked" / "metrics.json").read_text())
    assert list(attacked["models"]) == ["ours", "base"] and attacked["models"]["ours"]["utility"] is None
    run("-m", "fastguard.cli", "report", "run", "attacked")
    page = (here / "run" / "comparison.html").read_text()
    assert "attacked: ours" in page and "run: immunized" in page


def test_it_is_planned_and_listed(installed):
    _, run = installed
    planned = run("-m", "fastguard.cli", "plan", "llama-3-8b", "--defense", "gradient_ascent", "--json", "-")
    [plan] = json.loads(planned)["plans"]
    assert plan["defense"] == "gradient_ascent" and plan["steps_source"] == "this test"
    found = json.loads(run("-m", "fastguard.cli", "doctor", "--json"))["methods"]
    assert found["gradient_ascent"]["distribution"] == "outside-defense"


def test_it_trains_in_a_trainer(installed):
    _, run = installed
    assert "harmful_ce" in run("-c", MIXIN).splitlines()[-1]

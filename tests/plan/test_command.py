"""``fastguard plan``: what it prints, what it writes, what it refuses; and that the documentation is what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from fastguard import cli

DOCUMENT = Path(__file__).parents[2] / "docs" / "plan.md"
HEADLINE = ("llama-3-8b", "llama-3-70b", "--table")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})


def test_one_plan_is_shown_in_full():
    result = run("llama-3-8b", "--defense", "tar", "--gpus", 64, "--gpu", "h100")
    assert result.exit_code == 0, result.output
    flat = re.sub(r"\s+", " ", result.output)
    for said in (
        "8.03B parameters", "64 x h100", "snapshot", "inner optimizer", "outer accumulator", "reference: second model",
        "initial weights (host)", "attack: backward", "inner AdamW", "run of 750 steps (published)",
        "Nothing here was measured on a GPU", "40% of 989 Tflop/s", "largest batch that fits",
    ):  # fmt: skip
        assert said in flat, said


def test_the_same_as_json(tmp_path):
    printed = json.loads(run("llama-3-8b", "--defense", "repnoise", "--json", "-").output)
    written = tmp_path / "plan.json"
    assert run("llama-3-8b", "--defense", "repnoise", "--json", written).exit_code == 0
    assert json.loads(written.read_text()) == printed
    [plan] = printed["plans"]
    assert plan["setting"]["architecture"]["parameters"] == 8_030_261_248 and plan["setting"]["gpu"]["name"] == "h100"
    for side in (plan["fastguard"], plan["published"]):
        assert side["memory_bytes"] == pytest.approx(sum(i["bytes"] for i in side["memory"] if i["at_peak"]))
        assert side["step_seconds"] == pytest.approx(sum(p["seconds"] for p in side["parts"]))
        assert side["run_hours"] == pytest.approx(side["step_seconds"] * 2500 / 3600)
        assert side["fits"] == (plan["setting"]["batch"] <= side["largest_batch"])
    assert plan["published"]["memory_bytes"] > 5 * plan["fastguard"]["memory_bytes"]


def seconds(*arguments):
    return json.loads(run("llama-3-8b", "--json", "-", *arguments).output)["plans"][0]["fastguard"]["step_seconds"]


def test_options_reach_the_plan():
    sft = seconds("--defense", "sft")
    assert seconds("--defense", "sft", "--batch", 16) > 1.8 * sft
    assert seconds("--defense", "sft", "--efficiency", "matmul=0.8") < 0.6 * sft
    assert seconds("--defense", "sft", "--no-checkpointing") < sft and seconds("--defense", "sft", "--lora", 16) < sft
    assert seconds("--defense", "sft", "--gpu", "a100-80g") > 3 * sft
    tar = seconds("--defense", "tar")
    assert seconds("--defense", "tar", "--inner-steps", 32) == pytest.approx(tar / 2, rel=0.05)
    assert seconds("--defense", "tar", "--adversary-batch", 8) > 1.5 * tar


def test_several_models_are_an_overview():
    result = run("llama-3-8b", "mixtral-8x7b", "--defense", "booster")
    assert result.exit_code == 0 and "mixtral-8x7b" in result.output and "llama-3-8b" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "no folder or file"),
        (("llama-3-8b", "--defense", "prayer"), "defense: expected one of sft, repnoise, tar"),
        (("llama-3-8b", "--gpu", "abacus"), "gpu: expected one of h100"),
        (("llama-3-8b", "--dtype", "int3"), "dtype: expected one of mixed"),
        (("llama-3-8b", "--efficiency", "luck=1"), "efficiency: expected one of matmul"),
        (("llama-3-8b", "--gpus", "0"), "gpus: expected an integer of 1 or more"),
        (("llama-3-8b", "--table", "nowhere.md"), "table: no file"),
        (("mixtral-8x7b", "--lora", "8"), "mixture of experts"),
    ],
)
def test_mistakes_end_with_2_and_say_what_was_expected(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and said in re.sub(r"\s+", " ", result.output), result.output
    assert "Traceback" not in result.output


def test_a_table_needs_its_markers(tmp_path):
    (tmp_path / "page.md").write_text("nothing here\n")
    result = run("smollm2", "--table", tmp_path / "page.md")
    assert result.exit_code == 2 and "markers" in result.output
    (tmp_path / "page.md").write_text("a\n<!-- plan:headline -->\nold\n<!-- /plan:headline -->\nb\n")
    assert run("smollm2", "--table", tmp_path / "page.md").exit_code == 0
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "| smollm2-135m | tar |" in text and "old" not in text


def test_the_documentation_shows_what_the_command_writes(tmp_path):
    copy = tmp_path / "plan.md"
    copy.write_text(DOCUMENT.read_text())
    assert run(*HEADLINE, copy).exit_code == 0
    assert copy.read_text() == DOCUMENT.read_text(), f"run: fastguard plan {' '.join(HEADLINE)} docs/plan.md"


def test_planning_needs_no_torch():
    program = "import sys; from fastguard.plan import command; "
    program += "command.plans(['llama-3-8b'], 'tar', 'h100', 'mixed', '', {}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

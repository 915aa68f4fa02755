"""``fastguard plan``: what it prints, what it writes, what it refuses; and that the documentation is what it writes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

import fastguard
from fastguard import cli, methods
from fastguard.plan import command, show

DOCUMENTS = Path(__file__).parents[2] / "docs"
HEADLINE = ("llama-3-8b", "llama-3-70b", "--table")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})


def flat(result):
    return re.sub(r"\s+", " ", result.output)


def test_one_plan_is_shown_in_full():
    result = run("llama-3-8b", "--defense", "tar", "--gpus", 64, "--gpu", "h100")
    assert result.exit_code == 0, result.output
    for said in (
        "8.03B parameters", "64 x h100", "snapshot", "inner optimizer", "outer accumulator", "reference: second model",
        "initial weights", "attack: backward", "inner AdamW", "750 steps of 64 x 256 tokens: run_tar_cyber.sh",
        "Nothing here was measured on a GPU", "36% of 989 Tflop/s (torchtitan", "fewest GPUs that fit",
        "bound by network network",
        "attackers' batch: 32 sequences are rounded up to 64, 1 a GPU.",
        "published exact reductions moments adversary adversary adversary",
        "persistent adversary", "node adversary (not built)", "head gathered at first use",
    ):  # fmt: skip
        assert said in flat(result), said


def test_the_same_as_json(tmp_path):
    printed = json.loads(run("llama-3-8b", "--defense", "repnoise", "--json", "-").output)
    written = tmp_path / "plan.json"
    assert run("llama-3-8b", "--defense", "repnoise", "--json", written).exit_code == 0
    assert json.loads(written.read_text()) == printed
    [plan] = printed["plans"]
    assert plan["setting"]["architecture"]["parameters"] == 8_030_261_248 and plan["setting"]["gpu"]["name"] == "h100"
    assert plan["steps_source"] == "10,000 pairs, batch 4, 256 tokens, 1 epoch"
    assert plan["notes"] == ["batch: 4 sequences are rounded up to 64, 1 a GPU"] and plan["deviations"] == {}
    for side in (plan["exact"], plan["published"]):
        assert side["memory_bytes"] == pytest.approx(sum(i["bytes"] for i in side["memory"] if i["at_peak"]))
        assert side["step_seconds"] == pytest.approx(sum(p["seconds"] for p in side["parts"]))
        assert side["run_hours"] == pytest.approx(side["step_seconds"] * 157 / 3600)  # 10,000 pairs by 64
        assert side["fits"] and side["fewest_gpus"] <= 64
        assert side["bound"] == {"by": "network", "times": pytest.approx(side["bound"]["times"])}
        assert side["needs_seconds"]["network"] == max(side["needs_seconds"].values())
    assert plan["published"]["memory_bytes"] > 1.5 * plan["exact"]["memory_bytes"]


def test_what_can_be_run_is_said_of_the_levers_that_make_a_difference():
    """The outer optimizer waits on the host for TAR alone."""
    assert "can be run - yes" in flat(run("llama-3-8b", "--defense", "tar"))
    assert "can be run - yes" in flat(run("llama-3-8b", "--defense", "booster"))


def test_deviations_are_columns_of_their_own():
    plan = plan_of("--defense", "tar")
    assert list(plan["deviations"]) == [
        "bf16_reductions",
        "bf16_moments",
        "lora_adversary",
        "node_adversary",
        "persistent_adversary",
    ]
    for name, side in plan["deviations"].items():
        assert (side["run_hours"] < plan["exact"]["run_hours"]) and side["memory_bytes"] > 0, name
    assert set(plan["exact_without"]) >= {"late_head", "own_groups", "snapshot_on_host", "outer_on_host"}
    [name] = plan_of("--defense", "tar", "--deviation", "lora_adversary+persistent_adversary")["deviations"]
    assert name == "lora_adversary+persistent_adversary"
    fresh = plan_of("--defense", "tar", "--deviation", "persistent_adversary", "--fresh", 16)["deviations"]
    kept = plan["deviations"]["persistent_adversary"]
    assert fresh["persistent_adversary"]["run_hours"] > 1.5 * kept["run_hours"]
    without = plan_of("--defense", "tar", "--without", "late_head", "--without", "own_groups")
    assert without["exact"]["memory_bytes"] > plan["exact"]["memory_bytes"]
    adapters = plan_of("--defense", "tar", "--lora", 8)["deviations"]  # are what is trained, and attacked
    assert list(adapters) == ["bf16_reductions", "bf16_moments", "persistent_adversary"]


def test_steps_follow_from_samples_and_what_the_gpus_take_at_a_time():
    def steps(*arguments):
        return plan_of("--defense", "booster", *arguments)["setting"]["steps"]

    assert steps("--gpus", 1) == 10_000 and steps("--gpus", 8) == 6250  # 10 sequences, or two on each of 8
    assert steps() == 1563 and steps("--epochs", 10) == 782 and steps("--samples", 64) == 20
    assert steps("--global-batch", 128) == 782 and steps("--steps", 7) == 7
    assert plan_of("--defense", "booster", "--steps", 7)["steps_source"] == "as given"
    assert plan_of("--defense", "booster", "--tokens", 99)["setting"]["tokens"] == 99


def seconds(*arguments):
    return json.loads(run("llama-3-8b", "--json", "-", *arguments).output)["plans"][0]["exact"]["step_seconds"]


def test_options_reach_the_plan():
    large = ("--global-batch", 512, "--tokens", 2048)
    sft = seconds("--defense", "sft", *large)
    assert seconds("--defense", "sft", "--global-batch", 1024, "--tokens", 2048) > 1.8 * sft
    assert seconds("--defense", "sft", *large, "--efficiency", "matmul=0.8") < 0.6 * sft
    assert seconds("--defense", "sft", *large, "--no-checkpointing") < sft
    assert seconds("--defense", "sft", *large, "--lora", 16) < sft
    assert seconds("--defense", "sft", *large, "--gpu", "a100-80g") > 1.8 * sft
    assert seconds("--defense", "sft", "--global-batch", 512, "--micro", 1) > 4 * seconds("--defense", "sft")
    tar = seconds("--defense", "tar", *large)
    assert seconds("--defense", "tar", *large, "--set", "inner_steps=32") == pytest.approx(tar / 2, rel=0.05)
    assert seconds("--defense", "tar", *large, "--set", "batch=8") > 1.5 * tar
    two = ("--set", "inner_steps=32", "--set", "adversaries=2")
    assert seconds("--defense", "tar", *large, *two) == pytest.approx(tar, 0.05)
    assert seconds("--defense", "repnoise", *large, "--set", "layers=1") < 0.9 * seconds(
        "--defense", "repnoise", *large
    )


def plan_of(*arguments):
    return json.loads(run("llama-3-8b", "--json", "-", *arguments).output)["plans"][0]


def test_an_attackers_batch_follows_the_defenders_unless_it_was_given():
    def heads(*arguments):
        plan = plan_of("--defense", "tar", *arguments)
        return {p["name"]: p["flops"] / p["count"] for p in plan["exact"]["parts"] if p["name"].endswith("head")}

    on_8 = ("--gpus", 8)
    usual, wide = heads(*on_8), heads(*on_8, "--global-batch", 128)
    given, held_out = heads(*on_8, "--global-batch", 128, "--set", "batch=4"), heads(*on_8, "--set", "held_out=4")
    assert usual["retain: head"] == usual["tamper: head"] == 2 * usual["attack: head"]
    assert wide == {name: pytest.approx(2 * flops) for name, flops in usual.items()}
    assert given["attack: head"] == usual["attack: head"]
    assert given["tamper: head"] == wide["tamper: head"]  # what it holds out is an option of its own
    assert held_out["tamper: head"] == pytest.approx(usual["tamper: head"] / 2)


def test_the_options_are_shown_and_written():
    arguments = ("--defense", "tar", "--set", "inner_steps=8", "--set", "inner_lr=[1e-5, 2e-5]")
    plan = plan_of(*arguments)
    assert plan["options"]["inner_steps"] == 8 and plan["options"]["inner_lr"] == [1e-5, 2e-5]
    assert plan["options"]["read_every"] == 4 and plan["setting"]["given"] == ["inner_lr", "inner_steps"]
    assert "tar (inner steps 8, inner lr 1e-05 and 2e-05) on" in run("llama-3-8b", *arguments).output


def test_what_shards_cannot_have_is_planned_otherwise_and_said():
    """Tangents are a default that several GPUs cannot have."""
    several, asked = plan_of("--defense", "seam"), plan_of("--defense", "seam", "--set", "product=difference")
    [said] = several["exact"]["deviations"]
    assert said.startswith("product is difference here") and asked["exact"]["deviations"] == []
    assert several["exact"]["parts"] == asked["exact"]["parts"]
    assert f"{said}." in flat(run("llama-3-8b", "--defense", "seam"))
    alone = plan_of("--defense", "seam", "--gpus", 1, "--dtype", "bf16")["exact"]
    names = [p["name"] for p in alone["parts"]]
    assert alone["deviations"] == [] and "benign moved: forward and backward with tangents" in names
    assert "perturb" not in names and "snapshot" not in [i["name"] for i in alone["memory"]]


def test_micro_batches_are_not_for_the_published_step_nor_for_methods_that_do_not_take_them():
    large = ("--global-batch", 512)
    tar, divided = plan_of("--defense", "tar", *large), plan_of("--defense", "tar", *large, "--micro", 2)
    assert divided["published"] == tar["published"] and divided["exact"]["micro_batch"] == 2
    seam, whole = plan_of("--defense", "seam", *large), plan_of("--defense", "seam", *large, "--micro", 2)
    assert whole["exact"] == seam["exact"]
    assert "micro: seam is not known to take 2 at a time; batches are whole" in whole["notes"]


def test_a_name_with_a_hyphen_is_that_with_an_underscore():
    hyphen, underscore = (plan_of("--defense", name) for name in ("t-vaccine", "t_vaccine"))
    assert hyphen == underscore and hyphen["defense"] == "t_vaccine"


def test_the_planner_names_no_method():
    """Neither by name nor by title; what they cost they say themselves."""
    names = {n for e in methods.entries().values() if e.cost for n in (e.name, e.title, e.name.replace("_", "-"))}
    assert len(names) > 7
    sources = [p.read_text() for p in (Path(fastguard.__file__).parent / "plan").glob("*.py")]
    assert len(sources) > 7
    for name in names:
        for text in (*sources, inspect.getsource(cli.plan)):
            assert not re.search(rf"\b{name}\b", text, re.IGNORECASE), name


@pytest.fixture
def without_cost(monkeypatch):
    """A defense of another package that says nothing about its cost."""
    entry = dataclasses.replace(methods.find("sft"), name="prayer", cost=None)
    known = methods.defenses()
    monkeypatch.setattr(methods, "defenses", lambda: {**known, entry.name: entry})
    return entry


def test_a_method_without_a_cost_is_left_out_and_refused_by_name(without_cost):
    found = command.plans(["smollm2"], None, "h100", "mixed", "", {})
    assert [p.entry.name for p in found] == [name for name, entry in methods.defenses().items() if entry.cost]
    result = run("smollm2", "--defense", "prayer")
    assert result.exit_code == 2
    assert "defense: prayer has no cost that could be planned; expected one of sft," in flat(result)
    with pytest.raises(ValueError, match="prayer has no cost"):
        without_cost.load_cost()


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
        (("llama-3-8b", "--steps", "9", "--epochs", "2"), "steps: expected it without samples and epochs"),
        (("llama-3-8b", "--epochs", "0"), "epochs: expected a number above 0, got 0"),
        (("llama-3-8b", "--epochs", "inf"), "epochs: expected a number above 0, got inf"),
        (("llama-3-8b", "--global-batch", "0"), "global_batch: expected an integer of 1 or more, got 0"),
        (("llama-3-8b", "--without", "luck"), "without: expected some of late_head, own_groups"),
        (("llama-3-8b", "--defense", "tar", "--deviation", "luck"), "deviation: expected some of bf16_reductions"),
        (
            ("llama-3-8b", "--defense", "sft", "--deviation", "lora_adversary"),
            "deviation: expected one that sft has here, got 'lora_adversary', which changes nothing",
        ),
        (("llama-3-8b", "--table", "nowhere.md"), "table: no file"),
        (("mixtral-8x7b", "--lora", "8"), "mixture of experts"),
        (("smollm2", "--set", "batch=3"), "set: expected a defense whose options these are, got batch without one"),
        (
            ("smollm2", "--defense", "tar", "--set", "inner_stepz=3"),
            "set.inner_stepz: unknown key; expected one of inner",
        ),
        (
            ("smollm2", "--defense", "tar", "--set", "read_every=65"),
            "set.read_every: expected at most inner_steps (64)",
        ),
        (("smollm2", "--defense", "tar", "--set", "batch"), "set: expected KEY=VALUE, got 'batch'"),
        (("smollm2", "--defense", "tar", "--set", "batch=2", "--set", "batch=3"), "set: batch is given twice"),
        (("smollm2", "--defense", "tar", "--set", "batch=many"), "set.batch: expected int, got 'many'"),
        (("smollm2", "--defense", "tar", "--set", "batch=[3"), "set: batch: expected a value as in YAML"),
        (
            ("smollm2", "--defense", "t_vaccine", "--set", "layers=31"),
            "layers: expected 1 to 30, the layers of smollm2",
        ),
        (("smollm2", "--defense", "repnoise", "--set", "layers=32"), "layers: expected 1 to 31, the hidden states of"),
        (
            ("smollm2", "--defense", "booster", "--set", "mode=linearised"),
            "mode: expected weights, the one that can be",
        ),
        (("smollm2", "--defense", "seam", "--set", "product=tangent"), "expected difference, or tangent on 1 GPU"),
        (("smollm2", "--defense", "seam", "--set", "product=linearised"), "expected tangent or difference, those"),
    ],
)
def test_mistakes_end_with_2_and_say_what_was_expected(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and said in flat(result), result.output
    assert "Traceback" not in result.output


def test_a_table_needs_its_markers(tmp_path):
    (tmp_path / "page.md").write_text("nothing here\n")
    result = run("smollm2", "--table", tmp_path / "page.md")
    assert result.exit_code == 2 and "markers" in result.output
    (tmp_path / "page.md").write_text("a\n<!-- plan:headline -->\nold\n<!-- /plan:headline -->\nb\n")
    assert run("smollm2", "--table", tmp_path / "page.md").exit_code == 0
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old" not in text
    assert (
        "| smollm2-135m | tar | 750 | 64 | 256 |" in text and "| smollm2-135m | + node adversary (not built) |" in text
    )


def test_the_documentation_shows_what_the_command_writes(tmp_path):
    written = run(*HEADLINE, "-").output.strip()
    for name in ("plan.md", "performance.md"):
        document = (DOCUMENTS / name).read_text()
        said = f"run: fastguard plan {' '.join(HEADLINE)} docs/{name}"
        assert document == show.rewritten(document, written), said


def test_planning_needs_no_torch():
    program = "import sys; from fastguard.plan import command; "
    program += "command.plans(['llama-3-8b'], 'tar', 'h100', 'mixed', '', {}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

"""docs/directions.md: its code runs, in order, on a chat model with a planted direction."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("typer")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
from typer.testing import CliRunner

from directions import chat
from fastguard import cli
from fastguard.run import config

GUIDE = Path(__file__).parents[2] / "docs" / "directions.md"


def blocks():
    return re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which everything was run, what the commands printed, and the names that the code left."""
    here = tmp_path_factory.mktemp("guide")
    chat.folder(here / "models" / "assistant")
    harmful, harmless = chat.prompts(chat.BAD, 260), chat.prompts(chat.GOOD, 140)
    (here / "harmless.txt").write_text("\n".join(harmless[:60]))
    for name, rows in {
        "harmful": [{"prompt": p} for p in harmful[:60]],
        "pairs": [{"prompt": p, "harmless": "sorry g1"} for p in harmful],
        "instructions": [{"prompt": p, "answer": "g1 g2"} for p in harmless],
    }.items():
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names, printed = {"__name__": "guide"}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for number, (kind, text) in enumerate(blocks()):
            if kind == "python":
                exec(compile(text, f"directions.md, block {number}", "exec"), names)
            elif kind == "yaml":
                Path(re.match(r"# (\S+)", text)[1]).write_text(text)
            else:
                for line in text.splitlines():
                    program, command, *arguments = shlex.split(line)
                    assert program == "fastguard" and kind == "bash"
                    result = CliRunner().invoke(cli.app, [command, *arguments])
                    assert result.exit_code == 0, (line, result.output)
                    printed[command] = result.output
    return here, printed, names


def test_everything_runs_and_leaves_what_it_says(done):
    here, printed, names = done
    for name in ("refusal.safetensors", "refusal.html", "two.safetensors", "ablated/model.safetensors",
                 "adapter/adapter_model.safetensors", "runs/attack/report.html"):  # fmt: skip
        assert (here / name).is_file(), name
    assert "refusal score of harmful prompts falls from" in printed["directions"].replace("\n", " ")
    assert float(names["separated"][-1, 2]) == 1


def test_without_the_direction_it_does_not_refuse_and_with_it_added_it_does(done):
    _, _, names = done
    said = {key: chat.tokenizer().decode(names[key][0, names["prompt"].shape[1] :]) for key in ("ablated", "refusing")}
    assert "sorry" not in said["ablated"] and said["refusing"].split()[0] == "sorry", said


def test_the_defenses_do_what_their_comments_say(done):
    _, _, names = done
    assert 0 <= names["share"] <= 1 and names["rerouting"] > 0.9  # nothing has been trained away from its reference yet
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in names["model"].modules())


def test_the_attack_takes_refusal_away(done):
    here, _, _ = done
    metrics = json.loads((here / "runs" / "attack" / "metrics.json").read_text())
    (attack,) = metrics["models"]["assistant"]["attacks"]
    assert [p["refusal"] for p in attack["points"]][:2] == [1.0, 0.0]


def test_the_options_in_the_table_exist():
    options = set(re.findall(r"--[a-z][a-z-]+", GUIDE.read_text()))
    helps = "".join(
        CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
        for command in ("directions", "ablate", "attack")
    )
    assert options <= set(re.findall(r"--[a-z][a-z-]+", helps))
    beside = re.search(r"`(attacks: \{refusal.*?\}\})`", GUIDE.read_text())[1]
    assert config.from_dict(yaml.safe_load(beside)).all_attacks()["refusal ablation"].method == "refusal_ablation"

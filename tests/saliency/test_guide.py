"""docs/saliency.md: its code runs, in order, on a small chat model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
from typer.testing import CliRunner

from directions import chat
from fastguard import cli

GUIDE = Path(__file__).parents[2] / "docs" / "saliency.md"


def test_everything_runs_and_leaves_what_it_says(tmp_path, monkeypatch, capsys):
    chat.folder(tmp_path / "models" / "assistant")
    sets = {
        "pairs": [{"prompt": p} for p in chat.prompts(chat.BAD)],
        "instructions": [{"prompt": p, "answer": "g1 g2"} for p in chat.prompts(chat.GOOD)],
    }
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "guide"}
    for number, (kind, text) in enumerate(re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.S | re.M)):
        if kind == "python":
            exec(compile(text, f"saliency.md, block {number}", "exec"), names)
            continue
        for line in text.splitlines():
            program, command, *arguments = shlex.split(line)
            assert program == "fastguard" and kind == "bash"
            result = CliRunner().invoke(cli.app, [command, *arguments])
            assert result.exit_code == 0, (line, result.output)
    assert (tmp_path / "scores" / "saliency.html").is_file()
    assert {p.name for p in (tmp_path / "scores" / "safety").iterdir()} == {"saliency.safetensors"}
    assert (tmp_path / "pruned" / "config.json").is_file() and (tmp_path / "random" / "config.json").is_file()
    assert names["safety"].samples == 2 and names["utility"].samples == 2
    assert "entries pruned" in capsys.readouterr().out

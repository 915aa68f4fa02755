"""docs/merging.md: its code runs, in order, and leaves models that load."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
from typer.testing import CliRunner

from fastguard import cli
from fastguard.merging.options import OPTIONS
from merging import folders

GUIDE = Path(__file__).parents[2] / "docs" / "merging.md"
CALLED = {"base": "pretrained", "aligned": "chat", "model": "finetuned", "other": "harmful"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    here = folders.family(tmp_path_factory.mktemp("guide"), dtype=torch.bfloat16)
    for role, name in CALLED.items():
        (here / role).rename(here / name)
    names = {"__name__": "guide"}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.S | re.M)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for number, (kind, text) in enumerate(blocks):
            if kind == "python":
                exec(compile(text, f"merging.md, block {number}", "exec"), names)
            elif kind == "yaml":
                Path(re.match(r"# (\S+)", text)[1]).write_text(text)
            else:
                for line in text.splitlines():
                    program, *arguments = shlex.split(line)
                    assert program == "fastguard" and kind == "bash"
                    result = CliRunner().invoke(cli.app, arguments)
                    assert result.exit_code == 0, (line, result.output)
    return here, names


def test_everything_runs_and_loads(done):
    here, names = done
    written = ("averaged", "resta", "safe", "extrapolated", "fused", "projected", "merged", "negated")
    for name in written:
        folders.load(here / name, torch.bfloat16)
    whole = [torch.cat([t.float().flatten() for _, t in sorted(folders.stored(here / n).items())]) for n in written]
    assert all(not torch.equal(a, b) for i, a in enumerate(whole) for b in whole[:i])
    assert names["lowest"] in names["done"].cosines and len(names["done"].projected) > 0


def test_the_table_names_what_is_there():
    rows = re.findall(r"^\| `(\w+)` \(.*\| ([^|]+) \|$", GUIDE.read_text(), re.M)
    assert {name for name, _ in rows} == {"farn", "resta", "safe_lora", "lox", "somf"}
    for name, said in rows:
        fields = {f.name for f in dataclasses.fields(OPTIONS[name])}
        assert fields - {"seed"} <= set(re.findall(r"`(\w+)`", said)), name
        for option, default in re.findall(r"`(\w+)` \(([\d.]+)\)", said):
            assert getattr(OPTIONS[name](), option) == float(default), (name, option)

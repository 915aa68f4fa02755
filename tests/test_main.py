"""The script ``fastguard``: with typer the commands, with torch alone those that need nothing else."""

import json
import subprocess
import sys

import pytest
import torch

import fastguard
from fastguard import doctor

HIDDEN = "import sys; sys.modules.update(typer=None, rich=None, yaml=None); "


def script(*given, before=""):
    code = f"{before}import sys; sys.argv = ['fastguard', *{given!r}]; from fastguard._main import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("before", ["", HIDDEN])
def test_version(before):
    if not before:
        pytest.importorskip("typer")
    done = script("--version", before=f"{before}import sys; sys.modules['torch'] = None; ")  # needs no torch
    assert (done.returncode, done.stdout) == (0, f"fastguard {fastguard.__version__}\n"), done.stderr


@pytest.mark.parametrize("before", ["", HIDDEN])
def test_bench_has_one_parser_with_typer_and_without(before):
    if not before:
        pytest.importorskip("typer")
    done = script("bench", "--help", before=before)
    assert done.returncode == 0, done.stderr
    assert "(--gpu | --rehearse | --record MODEL)" in done.stdout and "--peers" in done.stdout
    done = script("bench", before=before)
    assert done.returncode == 2 and "one of the arguments --gpu --rehearse --record is required" in done.stderr


def test_doctor_starts_with_torch_alone():
    done = script("doctor", "--json", before=HIDDEN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"]["version"] == torch.__version__
    assert {op["op"] for op in found["ops"]} == set(doctor.OPS)


def test_doctor_prints_without_rich(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    found = doctor.examine()
    found["extension"] = {"file": None, "reason": "planted"}
    doctor.show(found)
    lines = capsys.readouterr().out.splitlines()
    for op in found["ops"]:
        assert f"{op['op']} {op['device']} {op['backend']} {op['why']}" in {" ".join(line.split()) for line in lines}
    assert any("absent: planted" in line for line in lines)
    assert [line for line in lines if line.startswith("- ")] == [f"- {hint}" for hint in doctor.hints(found)]


@pytest.mark.parametrize("given", [("demo",), ("doctor", "--yaml")])
def test_without_typer_other_commands_say_what_to_install(given):
    done = script(*given, before=HIDDEN)
    assert done.returncode == 2 and not done.stdout
    assert " ".join(given) in done.stderr and "pip install 'fastguard-kernels[hf,report]'" in done.stderr


def test_without_typer_help_says_what_there_is():
    done = script("--help", before=HIDDEN)
    assert done.returncode == 0 and "doctor [--json]" in done.stdout

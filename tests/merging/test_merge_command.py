"""`fastguard merge`: what it writes, what it says, how it fails."""

import pytest
import torch
import yaml

pytest.importorskip("typer")
pytest.importorskip("transformers")
from typer.testing import CliRunner

from fastguard import cli
from merging import folders, plain


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return folders.family(tmp_path_factory.mktemp("models"), dtype=torch.float32)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["merge", *(str(a) for a in arguments)])


def test_merges_and_takes_up(models, tmp_path):
    out = tmp_path / "out"
    arguments = ("ties", "--base", models / "base", "--model", f"{models / 'model'}=0.7", "--model", models / "other",
                 "--set", "density=0.4", "--set", "normalize=false", "--out", out)  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"model: {out} (30 tensors merged)" in " ".join(result.output.split())
    w = {role: folders.weights(models / role) for role in ("base", "model", "other")}
    expected = {
        k: plain.ties(t, [w["model"][k], w["other"][k]], [0.7, 1.0], [0.4, 0.4], False) for k, t in w["base"].items()
    }
    assert folders.close(folders.stored(out), expected) < 1e-7
    (out / "config.json").unlink()
    shards = sorted(out.glob("*.safetensors"))
    shards[0].unlink()
    again = run(*arguments)
    assert f"{len(shards) - 1} of {len(shards)} shards were there" in " ".join(again.output.split())
    refused = run(*arguments, "--set", "scale=2")
    assert refused.exit_code == 2 and "holds another edit" in refused.output
    assert run(*arguments, "--set", "scale=2", "--overwrite").exit_code == 0


def test_reads_a_recipe_and_says_what_was_projected(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    tree = {"merge_method": "linear", "models": [{"model": "model"}, {"model": "aligned", "parameters": {"weight": 3}}]}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(tree))
    result = run(tmp_path / "merge.yaml", "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 2 and "--dtype: expected it in" in result.output
    assert run(tmp_path / "merge.yaml", "--out", tmp_path / "out").exit_code == 0
    result = run("safe_lora", "--model", "model", "--aligned", "aligned", "--base", "base", "--set", "lowest=3",
                 "--out", tmp_path / "safe")  # fmt: skip
    assert "3 tensors merged, 3 of 21 modules projected" in " ".join(result.output.split()), result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tie", "--model", "model"), "method: expected one of linear, slerp"),
        (("slerp", "--model", "model"), "base: slerp needs a model as base, got none"),
        (("linear", "--model", "model=much"), "--model: expected a number behind =, got 'model=much'"),
        (("linear",), "model: expected 1 or more for linear, got 0"),
        (("farn", "--model", "model", "--base", "base", "--set", "weight"), "set: expected KEY=VALUE, got 'weight'"),
        (("farn", "--model", "model", "--base", "none/at/all"), "base: "),
        (("recipe.yaml",), "config: there is no file"),
    ],
)
def test_what_a_user_can_mend_ends_with_a_line(models, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(models)
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and said in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()

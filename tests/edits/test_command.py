"""`fastguard ablate`: what it writes, what it says, how it fails."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("typer")
pytest.importorskip("peft")
from typer.testing import CliRunner

from edits import oracle
from fastguard import cli
from fastguard.edits.basis import write_basis


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    path = tmp_path_factory.mktemp("given")
    write_basis(oracle.basis(), path / "directions.safetensors", {"layer": "1"})
    save_file({"basis": torch.ones(2, oracle.WIDTH)}, path / "crooked.safetensors")
    save_file({"basis": oracle.basis(width=8).float()}, path / "narrow.safetensors")
    save_file({"other": torch.ones(1)}, path / "other.safetensors")
    oracle.folder(path / "model", "llama_tied", torch.float32, shards=True)
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["ablate", *(str(a) for a in arguments)])


def test_writes_a_model_and_takes_it_up(given, tmp_path):
    out = tmp_path / "out"
    arguments = given / "model", "--directions", given / "directions.safetensors", "--out", out
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"model:  {out} (7 tensors edited)" in result.output
    expected = oracle.projected_logits(oracle.load(given / "model", torch.float32), oracle.basis().float())
    assert oracle.relative(oracle.logits(oracle.load(out, torch.float32)), expected) < 1e-5
    assert json.loads((out / "fastguard_edit.json").read_text())["source"] == str(given / "model")
    shards = len(list(out.glob("*.safetensors")))
    (out / sorted(p.name for p in out.glob("*.safetensors"))[0]).unlink()
    assert f"{shards - 1} of {shards} shards were there" in " ".join(run(*arguments).output.split())
    refused = run(*arguments, "--form", "norm_rows")
    assert refused.exit_code == 2 and "holds another edit" in refused.output
    assert run(*arguments, "--form", "norm_rows", "--overwrite").exit_code == 0


def test_writes_an_adapter(given, tmp_path):
    out = tmp_path / "adapter"
    result = run(given / "model", "--directions", given / "directions.safetensors", "--out", out, "--lora", 2)
    assert result.exit_code == 0, result.output
    assert "rank 2" in result.output and (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("directions", "more", "said"),
    [
        ("nowhere", (), "directions: there is no file"),
        ("other", (), "holds other, expected 'basis'"),
        ("crooked", (), "basis: its rows are not orthonormal"),
        ("narrow", (), "basis: expected rows of 32 features, got (2, 8)"),
        ("directions", ("--form", "diagonal"), "form: expected orthogonal, norm_columns, norm_rows, got 'diagonal'"),
        ("directions", ("--lora", 1), "rank: expected at least the 2 directions, got 1"),
        ("directions", ("--lora", 2, "--keep-tied"), "--keep-tied: an adapter sits on the embedding alone"),
    ],
)
def test_what_a_user_can_mend_ends_with_a_line(given, tmp_path, directions, more, said):
    file = given / f"{directions}.safetensors"
    result = run(given / "model", "--directions", file, "--out", tmp_path / "out", *more)
    assert result.exit_code == 2 and said in result.output, result.output
    assert not (tmp_path / "out").exists()

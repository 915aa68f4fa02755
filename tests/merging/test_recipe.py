"""mergekit's YAML: what comes out is what mergekit made of it; what is not read is named."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

pytest.importorskip("transformers")
from fastguard.merging import from_recipe, recipe
from merging import folders, record_mergekit

RECORDED = Path(__file__).with_name("mergekit.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return record_mergekit.families(tmp_path_factory.mktemp("models"))


def written(tmp_path, tree):
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "merge.yaml"


@pytest.mark.parametrize("name", record_mergekit.RECIPES)
def test_equals_mergekit(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(models)  # paths are read from the working folder
    from_recipe(written(tmp_path, record_mergekit.RECIPES[name]), tmp_path / "out")
    with safe_open(RECORDED, "pt") as file:
        expected = {k.split("/")[1]: file.get_tensor(k).double() for k in file.keys() if k.startswith(f"{name}/")}  # noqa: SIM118
    found = folders.stored(tmp_path / "out")
    assert found.keys() == expected.keys()
    for k, t in expected.items():
        assert folders.close({k: found[k]}, {k: t}) < 2e-7, k
    layout = "a" if name == "linear" else "base"  # and it is no copy of what it began with
    began = folders.stored(models / layout)
    assert folders.close(began, expected) > 1e-3
    assert all(torch.isfinite(t).all() for t in found.values())


GOOD = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slices": []}, r"config.slices: not read here; expected one of merge_method, base_model"),
        ({"tokenizer_source": "union"}, "config.tokenizer_source"),
        ({"merge_method": "della"}, "method: expected one of linear"),
        ({"merge_method": None}, "merge_method: expected a name, got None"),
        ({"models": None}, "models: expected a list"),
        ({"models": [{"model": "a", "parameters": {"gamma": 1}}]}, r"models\[0\].parameters.gamma: not read here"),
        ({"models": [{"model": "a", "layer_range": [0, 1]}]}, r"models\[0\].layer_range: not read here"),
        ({"models": [{"model": "a+adapter"}]}, r"models\[0\]: expected a folder or a Hub id"),
        ({"models": [{"model": "base", "parameters": {"weight": 1}}, {"model": "a"}]},
         "expected none of the base model"),
        ({"parameters": {"epsilon": 0.1}}, "epsilon: unknown key; expected one of normalize, scale"),
        ({"parameters": {"weight": "heavy"}}, "weight: expected a number, numbers by layer, or either by filter"),
        ({"parameters": {"density": [0.5, 2]}}, "density: expected a number from 0 to 1"),
        ({"parameters": {"weight": [{"filter": "mlp", "value": 1}]}}, "weight: expected a last entry without filter"),
        ({"parameters": {"weight": [{"filter": "mlp", "vaule": 1}]}}, "weight: expected {filter: TEXT, value"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "out_dtype: expected dtype's"),
        ({"dtype": "int8"}, "dtype: expected float32, bfloat16"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(models, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(models)
    with pytest.raises(ValueError, match=said):
        from_recipe(written(tmp_path, {**GOOD, **change}), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="config: there is no file"):
        from_recipe(tmp_path / "none.yaml", tmp_path / "out")
    (tmp_path / "bad.yaml").write_text("merge_method: [")
    with pytest.raises(ValueError, match="is no YAML"):
        from_recipe(tmp_path / "bad.yaml", tmp_path / "out")
    (tmp_path / "list.yaml").write_text("- ties")
    with pytest.raises(ValueError, match="config: expected a mapping"):
        from_recipe(tmp_path / "list.yaml", tmp_path / "out")


def test_our_own_methods_have_recipes_too():
    tree = {"merge_method": "resta", "models": [{"model": "m"}], "aligned": "a", "unaligned": "u",
            "parameters": {"gamma": 0.7}}  # fmt: skip
    given = recipe.arguments(tree)
    assert (given["method"], given["aligned"], given["unaligned"]) == ("resta", "a", "u")
    assert given["options"] == {"gamma": 0.7} and [m.model for m in given["models"]] == ["m"] and "base" not in given

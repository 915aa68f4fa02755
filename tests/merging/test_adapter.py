"""SafeLoRA on a PEFT adapter: equal to the published procedure, which makes every product, and loadable."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
import peft

from fastguard.edits.stream import RECORD
from fastguard.merging import merge
from merging import folders, plain


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = folders.family(tmp_path_factory.mktemp("models"), dtype=torch.float64)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    lora = peft.get_peft_model(folders.load(path / "aligned"), config).double()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    lora.save_pretrained(path / "adapter")
    return path


def published(models, pick):
    """[d_out, d_out] and all, module by module; the tensors that come out, and the cosines."""
    tensors = {k: t.double() for k, t in load_file(models / "adapter" / "adapter_model.safetensors").items()}
    aligned, base = (folders.weights(models / role) for role in ("aligned", "base"))
    cosines, turned = {}, {}
    for name in [n for n in tensors if ".lora_B." in n]:
        module = name.removesuffix(".lora_B.weight")
        weight = module.removeprefix("base_model.model.") + ".weight"
        c = plain.published_projection(aligned[weight], base[weight])
        a, b = tensors[f"{module}.lora_A.weight"], tensors[name]
        turned[module], cosines[module] = c @ b, plain.cosine(c @ b @ a, b @ a)
    for module in pick(cosines):
        tensors[f"{module}.lora_B.weight"] = turned[module]
    return tensors, cosines


def run(models, out, options, **more):
    return merge("safe_lora", models / "adapter", out, aligned=models / "aligned", base=models / "base",
                 options=options, **more)  # fmt: skip


@pytest.mark.parametrize("options", [{"lowest": 4}, {"tau": 0.7}])
def test_equals_the_published_procedure_and_loads(models, tmp_path, options):
    done = run(models, tmp_path / "out", options)
    pick = {"lowest": lambda c: sorted(c, key=c.get)[:4], "tau": lambda c: [m for m, x in c.items() if x <= 0.7]}
    expected, cosines = published(models, pick[next(iter(options))])
    assert done.cosines.keys() == cosines.keys() and len(cosines) == 9
    assert all(done.cosines[m] == pytest.approx(c, rel=1e-10) for m, c in cosines.items())
    assert 0 < len(done.projected) < 9
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert folders.close(found, expected) < 1e-14
    assert folders.close(load_file(models / "adapter" / "adapter_model.safetensors"), expected) > 1e-2
    loaded = peft.PeftModel.from_pretrained(folders.load(models / "aligned"), tmp_path / "out")
    weight = loaded.merge_and_unload().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    change = 2 * expected[f"{module}.lora_B.weight"] @ expected[f"{module}.lora_A.weight"]
    start = folders.weights(models / "aligned")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(weight, start + change, atol=1e-12)


def test_it_is_what_the_full_checkpoint_gets(models, tmp_path):
    """delta = W - W_aligned plays the part of B A."""
    lora = peft.PeftModel.from_pretrained(folders.load(models / "aligned"), models / "adapter")
    lora.merge_and_unload().save_pretrained(tmp_path / "model")
    one = run(models, tmp_path / "adapter", {"lowest": 4})
    two = merge("safe_lora", tmp_path / "model", tmp_path / "full", aligned=models / "aligned", base=models / "base",
                options={"lowest": 4})  # fmt: skip
    assert {f"base_model.model.{m}" for m in (p.removesuffix(".weight") for p in two.projected)} == set(one.projected)
    merged = peft.PeftModel.from_pretrained(folders.load(models / "aligned"), tmp_path / "adapter").merge_and_unload()
    assert folders.close(folders.stored(tmp_path / "full"), dict(merged.state_dict())) < 1e-12


def test_origin_and_what_is_there_already(models, tmp_path):
    run(models, tmp_path / "out", {})
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["beside"] == {role: str(models / role) for role in ("aligned", "base")} and record["complete"]
    assert len(record["edit"]["tensors"]) == 9  # ten of the lowest, and there are nine
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## safe_lora" in card and "- merge\n" in card and "library_name: peft" in card
    with pytest.raises(FileExistsError, match="is there; overwrite=True"):
        run(models, tmp_path / "out", {})
    run(models, tmp_path / "out", {"lowest": 1}, overwrite=True)
    assert len(json.loads((tmp_path / "out" / RECORD).read_text())["edit"]["tensors"]) == 1
    with pytest.raises(ValueError, match="which is read"):
        run(models, models / "adapter", {}, overwrite=True)


def test_adapters_that_are_not_read_are_named(models, tmp_path):
    mine = shutil.copytree(models / "adapter", tmp_path / "adapter")
    config = json.loads((mine / "adapter_config.json").read_text())

    def refused(kind, said, options=None, **changes):
        (mine / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(kind, match=said):
            merge(
                "safe_lora", mine, tmp_path / "out", aligned=models / "aligned", base=models / "base", options=options
            )
        assert not (tmp_path / "out").exists()

    refused(ValueError, "has use_dora", use_dora=True)
    refused(ValueError, "has fan_in_fan_out", fan_in_fan_out=True)
    refused(ValueError, "expected a LoRA adapter .* got 'IA3'", peft_type="IA3")
    refused(ValueError, "modules: expected some of the adapter's", {"modules": ["nowhere"]})
    tensors = load_file(mine / "adapter_model.safetensors")
    odd = {k.replace("q_proj", "z_proj"): t for k, t in tensors.items()}
    save_file(odd, mine / "adapter_model.safetensors")
    refused(ValueError, r"aligned: expected 'model.layers.0.self_attn.z_proj.weight' of \[32, 32\] .* no such tensor")
    (mine / "adapter_model.safetensors").unlink()
    refused(ValueError, "has no adapter_model.safetensors")
    with pytest.raises(ValueError, match="dtype: expected none of an adapter"):
        run(models, tmp_path / "out", {}, dtype="float32")
    with pytest.raises(FileNotFoundError, match="merge them first"):
        merge("farn", models / "adapter", tmp_path / "out", base=models / "base")

"""to_huggingface: what from_pretrained then loads is what was trained, bit for bit; shards of two ranks are in
distributed_worker.py."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tiny
from fastguard.nested import LoRAAdversary
from fastguard.trainers import convert, save, to_huggingface
from tiny_models import pair
from tiny_models import tiny as tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Model and tokenizer before training; its generation settings are no defaults."""
    folder = tiny.folder(tmp_path_factory.mktemp("models") / "base")
    GenerationConfig(max_new_tokens=7, do_sample=False).save_pretrained(folder)
    return folder


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """With other values in all that requires a gradient."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def loaded(folder: Path, **options) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, t in b.items():
        assert a[name].dtype == t.dtype and torch.equal(a[name], t), name


def own(folder: Path, model: nn.Module) -> Path:
    return save(folder, 3, model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def test_a_checkpoint_of_ours(base, tmp_path):
    model = trained(loaded(base))
    step = own(tmp_path / "run", model)
    for checkpoint in (tmp_path / "run", step):
        done = to_huggingface(checkpoint, base, tmp_path / "out" / "hf", overwrite=True)
        assert_same(loaded(done.folder), model)
    assert (done.kind, done.dtype, done.kept, done.tokenizer) == ("fastguard checkpoint", torch.float32, 0, True)
    assert str(done).endswith("hf: 20 tensors of a fastguard checkpoint, in float32, with a tokenizer")
    assert AutoTokenizer.from_pretrained(done.folder).encode("ab") == tiny.tokenizer().encode("ab")
    assert GenerationConfig.from_pretrained(done.folder).max_new_tokens == 7
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["hf"]
    again = to_huggingface(step, model.config, tmp_path / "from config", dtype=torch.bfloat16)
    assert_same(loaded(again.folder), copy.deepcopy(model).bfloat16())
    assert not again.tokenizer


def test_frozen_parameters_come_from_the_base(base, tmp_path):
    model = loaded(base)
    model.model.embed_tokens.requires_grad_(False)
    step = own(tmp_path / "run", trained(model))
    done = to_huggingface(step, str(base), tmp_path / "hf")
    assert_same(loaded(done.folder), model)
    assert done.kept == 2  # tied: the head too
    with pytest.raises(
        ValueError, match=r"lacks 2 parameters of the model, the first '.*embed.*; those that were frozen"
    ):
        to_huggingface(step, model.config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_other_architectures(name, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "PORTION", 5000)
    model = trained(tiny_model(name))
    done = to_huggingface(own(tmp_path / "run", model), model.config, tmp_path / "hf")
    assert_same(loaded(done.folder, experts_implementation="eager") if "moe" in name else loaded(done.folder), model)


def peft(base: Path) -> PeftModelForCausalLM:
    torch.manual_seed(5)
    return get_peft_model(loaded(base), LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]))


def assert_computes_the_same(a: nn.Module, b: nn.Module) -> None:
    with torch.no_grad():
        batch = pair()[0]
        assert torch.equal(a.eval()(**batch).logits, b.eval()(**batch).logits)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("through", ["model", "folder"])
def test_adapters(through, merge, base, tmp_path):
    model = trained(peft(base))
    step = own(tmp_path / "run", model)
    given = peft(base)
    if through == "folder":
        given.save_pretrained(tmp_path / "adapter")
        given = tmp_path / "adapter"
    done = to_huggingface(step, given, tmp_path / "hf", merge=merge)
    assert (done.folder / "adapter_config.json").exists() != merge
    assert_computes_the_same(loaded(done.folder), model.merge_and_unload() if merge else model)
    with pytest.raises(
        ValueError, match=r"holds nothing of the model; .*lora_A.*; pass the PEFT model, or a folder with its adapter_"
    ):
        to_huggingface(step, base, tmp_path / "plain")


def test_an_adversarys_adapters_are_left_behind(base, tmp_path):
    model = loaded(base)
    adversary = LoRAAdversary(model, rank=2)
    step = own(tmp_path / "run", trained(model))
    done = to_huggingface(step, base, tmp_path / "hf")
    adversary.remove()
    assert_same(loaded(done.folder), model)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def sharded(model: nn.Module, mesh) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor

    return {name: distribute_tensor(t.detach(), mesh, [Shard(0)]) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["model", None, "state_dict"])
def test_plain_shards(prefix, base, tmp_path, one_rank):
    model = trained(loaded(base))
    state = sharded(model, one_rank)
    beside = {"step": torch.tensor(3), "optimizer": {"state.model.norm.weight": torch.ones(2)}}
    dcp.save({**beside, prefix: state} if prefix else {**beside, **state}, checkpoint_id=tmp_path / "dcp")
    done = to_huggingface(tmp_path / "dcp", base, tmp_path / "hf")
    assert_same(loaded(done.folder), model)
    assert done.kind == "torch.distributed.checkpoint"


def test_a_sharded_trainer_checkpoint(base, tmp_path, one_rank):
    """As accelerate writes it, with the wrappers of compilation and checkpointing in the names."""
    model = trained(loaded(base))
    state = {
        name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.").replace("model.", "_orig_mod.model.", 1): t
        for name, t in sharded(model, one_rank).items()
    }
    checkpoint = tmp_path / "checkpoint-4"
    dcp.save({"model": state}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0")
    for path in (checkpoint, checkpoint / "pytorch_model_fsdp_0"):
        done = to_huggingface(path, base, tmp_path / "hf", overwrite=True)
        assert_same(loaded(done.folder), model)
    with pytest.raises(ValueError, match=r"model: got None, but .* holds tensors alone"):
        to_huggingface(checkpoint, None, tmp_path / "none")
    with pytest.raises(ValueError, match=r"expected a fastguard run or step.*it holds checkpoint-4: name one"):
        to_huggingface(tmp_path, base, tmp_path / "none")


def test_adapters_of_a_sharded_trainer_checkpoint(base, tmp_path):
    from peft import get_peft_model_state_dict

    model = trained(peft(base))
    dcp.save({"model": get_peft_model_state_dict(model)}, checkpoint_id=tmp_path / "c" / "pytorch_model_fsdp_0")
    done = to_huggingface(tmp_path / "c", peft(base), tmp_path / "hf")
    assert_computes_the_same(loaded(done.folder), model)


def test_gathered_and_whole_trainer_checkpoints(base, tmp_path):
    model = trained(loaded(base))
    (tmp_path / "gathered").mkdir()
    torch.save(model.state_dict(), tmp_path / "gathered" / "pytorch_model_fsdp.bin")
    assert_same(loaded(to_huggingface(tmp_path / "gathered", base, tmp_path / "a").folder), model)
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(base / "tokenizer.json", tmp_path / "whole")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "whole")
    done = to_huggingface(tmp_path / "whole", None, tmp_path / "b", dtype=torch.bfloat16)
    assert_same(loaded(done.folder), model.bfloat16())
    assert done.tokenizer and done.kind == "Hugging Face checkpoint"
    adapters = trained(peft(base))
    adapters.save_pretrained(tmp_path / "adapters")
    done = to_huggingface(tmp_path / "adapters", None, tmp_path / "c", merge=True)
    assert_same(loaded(done.folder), adapters.merge_and_unload())


def test_what_does_not_fit_is_named(base, tmp_path):
    model = loaded(base)
    state = dict(model.state_dict())
    up = "model.layers.1.mlp.up_proj.weight"

    def written(**changes: torch.Tensor | None) -> Path:
        changed = {name: t for name, t in {**state, **changes}.items() if t is not None}
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        dcp.save({"model": changed}, checkpoint_id=tmp_path / "c")
        return tmp_path / "c"

    for changes, message in (
        ({up: None}, rf"lacks 1 parameters of the model, the first '{up}'$"),
        (
            {"model.more": torch.ones(1)},
            r"1 unexpected keys, of which the model knows nothing, the first 'model.model.more'",
        ),
        ({"layers.0.q_proj.lora_A.weight": torch.ones(1)}, r"1 unexpected keys.*lora_A.*; pass the PEFT model"),
        ({up: torch.ones(3, 2)}, rf"'model.{up}' has shape \(3, 2\), but the model's {up} \(48, 32\)"),
        (
            {"lm_head.weight": torch.ones(258, 32)},
            r"lm_head.weight differs from .*embed_tokens.weight, but the model ties",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            to_huggingface(written(**changes), base, tmp_path / "out")
    dcp.save({"other": torch.ones(1)}, checkpoint_id=tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds nothing of the model; its first key is 'other'"):
        to_huggingface(tmp_path / "other", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_named(base, tmp_path):
    step = own(tmp_path / "run", loaded(base))
    out = tmp_path / "out"
    for arguments, kind, message in (
        ((tmp_path / "no", base, out), FileNotFoundError, "checkpoint: there is no folder"),
        ((step, tmp_path / "no", out), FileNotFoundError, r"model\.name: there is no folder"),
        (
            (step, 3, out),
            TypeError,
            "model: expected a folder, an id, a transformers configuration or a model, got int",
        ),
        ((step, base, base), FileExistsError, r"out: .* is there; overwrite=True"),
    ):
        with pytest.raises(kind, match=message):
            to_huggingface(*arguments)
    with pytest.raises(ValueError, match=r"out: .* is, or holds, .*base'"):
        to_huggingface(step, base, base.parent, overwrite=True)
    with pytest.raises(ValueError, match=r"dtype: expected a floating torch\.dtype or None, got 'bfloat16'"):
        to_huggingface(step, base, out, dtype="bfloat16")
    with pytest.raises(ValueError, match="merge: expected a checkpoint of adapters"):
        to_huggingface(step, base, out, merge=True)
    (tmp_path / "run" / "latest").write_text("step-00000009")
    with pytest.raises(FileNotFoundError, match="latest names step-00000009, which is not there"):
        to_huggingface(tmp_path / "run", base, out)

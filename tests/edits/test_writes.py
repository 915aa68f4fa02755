"""Residual writes are found by what they do; what does not fit is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers

import tiny_models
from edits import oracle
from fastguard.edits import source_folder
from fastguard.edits import writes as found_by
from fastguard.edits.writes import residual_writes

EXPECTED = {
    "qwen3": {"embed_tokens.weight": 1, "self_attn.o_proj.weight": 0, "mlp.down_proj.weight": 0},
    "gpt_neox": {"embed_in.weight": 1, "attention.dense.weight": 0, "attention.dense.bias": 0,
                 "mlp.dense_4h_to_h.weight": 0, "mlp.dense_4h_to_h.bias": 0},
    "opt": {"embed_tokens.weight": 1, "embed_positions.weight": 1, "self_attn.out_proj.weight": 0,
            "self_attn.out_proj.bias": 0, "fc2.weight": 0, "fc2.bias": 0},
    "gpt_oss": {"embed_tokens.weight": 1, "self_attn.o_proj.weight": 0, "self_attn.o_proj.bias": 0,
                "mlp.experts.down_proj": 2, "mlp.experts.down_proj_bias": 1},
    "falcon": {"word_embeddings.weight": 1, "self_attention.dense.weight": 0, "mlp.dense_4h_to_h.weight": 0},
}  # fmt: skip
MORE = {
    "gpt_oss": ("GptOss", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "falcon": ("Falcon", {}),
    "bloom": ("Bloom", {}),
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    for name, entry in MORE.items():
        monkeypatch.setitem(tiny_models.ARCHITECTURES, name, entry)
    return lambda name, **changes: oracle.folder(tmp_path / name, name, torch.float32, **changes)


@pytest.mark.parametrize("name", EXPECTED)
def test_found_by_what_they_do(made, name):
    writes = residual_writes(source_folder(made(name)))
    for tensor, write in writes.tensors.items():
        [axis] = [axis for end, axis in EXPECTED[name].items() if tensor.endswith("." + end)]
        assert write.axis == axis and write.norm is None, tensor
    # where adapters can sit: matrices alone, not experts that share a parameter or positions that are looked up shifted
    beyond = ("bias", "experts.down_proj", "embed_positions.weight")
    assert writes.adaptable == {n.removesuffix(".weight") for n in writes.tensors if not n.endswith((*beyond, "_bias"))}
    inner = sum("embed" not in end for end in EXPECTED[name])
    assert len(writes.tensors) == len(EXPECTED[name]) - inner + 3 * inner


def test_a_square_model_is_no_harder(made):
    """Where every axis has the stream's width, and names are no help, only what a tensor does can tell."""
    folder = made("llama", intermediate_size=32, num_key_value_heads=4)
    found = set(residual_writes(source_folder(folder)).tensors)
    assert {n.rpartition(".layers.")[2][2:] for n in found} - {n for n in found if "embed" in n} >= {
        "mlp.down_proj.weight"
    }
    assert len(found) == 7


class _Experts(torch.nn.Module):
    """Of which only the first is ever asked."""

    def __init__(self, dead=False):
        super().__init__()
        self.up = torch.nn.Linear(64, 96)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(96, 64) for _ in range(2))
        self.dead = torch.nn.Linear(96, 64) if dead else None

    def forward(self, x):
        return self.experts[0](self.up(x).relu())


class _Layer(torch.nn.Module):
    def __init__(self, dead=False):
        super().__init__()
        self.block = _Experts(dead)

    def forward(self, x):
        return x + self.block(x)


def test_an_expert_that_got_no_token_is_what_its_siblings_are():
    call = found_by._Call((torch.randn(2, 5, 64, dtype=torch.float64),), {}, None)
    with torch.no_grad():
        found = found_by._layer(_Layer().double(), call, "layer 0")
        kinds = {name: (w.kind, w.axis) for name, w in found.items()}
        assert kinds == {
            f"block.experts.{i}.{name}": (kind, 0)
            for i in range(2)
            for name, kind in (("weight", "matrix"), ("bias", "bias"))
        }
        with pytest.raises(ValueError, match=r"block.dead.weight of layer 0 did nothing in a trial"):
            found_by._layer(_Layer(dead=True).double(), call, "layer 0")


def test_a_norm_behind_the_embedding_is_refused(made):
    with pytest.raises(ValueError, match=r"input of layer 0 keeps .* of a direction: something else of bloom"):
        residual_writes(source_folder(made("bloom")))


def test_the_check_of_the_stream_notices_a_write_that_was_missed(made, monkeypatch):
    whole = found_by._find
    monkeypatch.setattr(found_by, "_find", lambda m: {k: w for k, w in whole(m).items() if "1.mlp" not in k})
    with pytest.raises(ValueError, match=r"output of layer 1 keeps"):
        residual_writes(source_folder(made("llama")))


def test_foreign_tensors_missing_ones_and_other_kinds_are_named(made, tmp_path):
    folder = made("llama")
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, said = load_file(file), json.loads(config.read_text())

    def refused(match, tensors=whole, **changes):
        save_file(tensors, file, {"format": "pt"})
        config.write_text(json.dumps({**said, **changes}))
        with pytest.raises(ValueError, match=match):
            residual_writes(source_folder(folder))

    refused(r"model.layers.0.extra.weight in .* is no tensor", {**whole, "model.layers.0.extra.weight": torch.ones(2)})
    name = "model.layers.2.mlp.down_proj.weight"
    refused(f"lacks 1 weights, the first {name}", {k: t for k, t in whole.items() if k != name})
    refused(f"{name} has shape", {**whole, name: torch.ones(8, 40)})
    refused("quantised", quantization_config={"quant_method": "fp8"})
    refused("model.name.*configuration", model_type="nothing_known")
    vision = transformers.Gemma3Config(vision_config=dict(hidden_size=8, num_hidden_layers=1)).to_dict()
    refused("more than a language model", **json.loads(json.dumps(vision, default=str)))

"""Edited weights against projection at every residual write, and which tensors are edited."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

from edits import oracle
from fastguard.edits import source_folder, stream
from fastguard.edits.ablate import ablation
from fastguard.edits.adapter import adapter
from fastguard.edits.writes import residual_writes

# Llama's norms compute in fp32 whatever the model's dtype, which rounds 1e-16 up to 1e-8; GPT-2's do not.
ROUNDING = {"gpt2": 1e-13}


def weights(folder):
    return {k: t for path in sorted(Path(folder).glob("model*.safetensors")) for k, t in load_file(path).items()}


def cut(folder, out, form="orthogonal", **options):
    source = source_folder(folder)
    return stream(source, out, ablation(source, oracle.basis(), form, **options))


@pytest.mark.parametrize(
    ("name", "edited"),
    [
        ("llama", 1 + 3 * 2),
        ("llama_tied", 1 + 3 * 2),
        ("gpt2", 2 + 3 * 4),  # positions, and every write has a bias; transposed; tied
        ("mixtral", 1 + 3 * (1 + 3)),  # experts: one parameter in memory, many tensors on disk
        ("phi", 1 + 3 * 4),  # attention and MLP side by side
    ],
)
def test_the_edited_model_computes_what_projection_does(tmp_path, name, edited):
    folder, q = oracle.folder(tmp_path / "model", name, shards=name == "llama_tied"), oracle.basis()
    done = cut(folder, tmp_path / "out")
    assert done.edited == edited and done.shards == (
        1 if name != "llama_tied" else len(list(folder.glob("*.safetensors")))
    )
    before, after = oracle.load(folder), oracle.load(tmp_path / "out")
    expected = oracle.projected_logits(before, q)
    assert oracle.relative(oracle.logits(before), expected) > 0.05  # ablation does something
    assert oracle.relative(oracle.logits(after), expected) < ROUNDING.get(name, 1e-7)
    assert max(oracle.stream_shares(after, q)) < 1e-14 < 1e-2 < max(oracle.stream_shares(before, q))
    assert not after.config.tie_word_embeddings
    own = weights(tmp_path / "out")
    assert torch.equal(own["lm_head.weight"], before.lm_head.weight)  # the head is what it was
    unedited = [n for n, t in weights(folder).items() if torch.equal(own[n], t)]
    assert len(unedited) == len(weights(folder)) - edited


def test_keep_tied_edits_the_head_with_the_embedding(tmp_path):
    folder, q = oracle.folder(tmp_path / "model", "llama_tied"), oracle.basis()
    cut(folder, tmp_path / "out", keep_tied=True)
    before, after = oracle.load(folder), oracle.load(tmp_path / "out")
    assert after.config.tie_word_embeddings and "lm_head.weight" not in weights(tmp_path / "out")
    expected = oracle.projected_logits(before, q)
    assert oracle.relative(oracle.logits(after), expected) > 1e-3  # the deviation that it is
    with torch.no_grad():
        head = before.lm_head.weight
        before.config.tie_word_embeddings = False
        before.lm_head.weight = torch.nn.Parameter(head - head @ q.T @ q)
    assert oracle.relative(oracle.logits(after), oracle.projected_logits(before, q)) < 1e-7


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_behind_a_norm_the_stream_is_free_but_no_equality_is_claimed(tmp_path, name, monkeypatch):
    import tiny_models

    monkeypatch.setitem(tiny_models.ARCHITECTURES, "olmo2", ("Olmo2", {}))
    folder, q = oracle.folder(tmp_path / "model", name), oracle.basis()
    source = source_folder(folder)
    writes = residual_writes(source)
    offsets = {(w.norm is not None, w.offset) for w in writes.tensors.values() if w.kind == "matrix"}
    assert offsets == {(True, 1.0 if name == "gemma2" else 0.0)}
    stream(source, tmp_path / "out", ablation(source, q, writes=writes))
    before, after = oracle.load(folder), oracle.load(tmp_path / "out")
    assert max(oracle.stream_shares(after, q)) < 1e-6 < 1e-2 < max(oracle.stream_shares(before, q))


@pytest.mark.parametrize("form", ["norm_columns", "norm_rows"])
def test_norm_preserving_forms_by_name(tmp_path, form):
    from fastguard.directions.edit import FORMS

    folder, q = oracle.folder(tmp_path / "model", "llama_tied"), oracle.basis()
    cut(folder, tmp_path / "out", form)
    before, after = weights(folder), weights(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(after[name], FORMS[form](before[name], q))
    embedding = "model.embed_tokens.weight"
    model = oracle.load(tmp_path / "out")
    if form == "norm_columns":
        torch.testing.assert_close(after[embedding], FORMS[form](before[embedding], q, axis=1))
        assert max(oracle.stream_shares(model, q)) < 1e-14
    else:  # heretic edits neither the embedding nor, so, the head
        assert torch.equal(after[embedding], before[embedding]) and model.config.tie_word_embeddings
        assert max(oracle.stream_shares(model, q)) > 1e-2


def test_bf16_stays_bf16_and_the_record_tells_what_was_done(tmp_path):
    folder = oracle.folder(tmp_path / "model", "llama", torch.bfloat16)
    cut(folder, tmp_path / "out")
    before, after = weights(folder), weights(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    w = before["model.layers.0.self_attn.o_proj.weight"].double()
    left = oracle.basis() @ after["model.layers.0.self_attn.o_proj.weight"].double()
    assert float(left.norm() / (oracle.basis() @ w).norm()) < 1.5e-2
    options = json.loads((tmp_path / "out" / "fastguard_edit.json").read_text())["edit"]["options"]
    assert options["form"] == "orthogonal" and options["directions"] == 2 and len(options["basis_sha256"]) == 64
    source = source_folder(folder)
    with pytest.raises(FileExistsError, match="another edit"):  # other directions are another edit
        stream(source, tmp_path / "out", ablation(source, oracle.basis(seed=1)))


def test_files_of_the_base_model_and_old_masks(tmp_path):
    """GPT-2's own file names tensors without the model's prefix, and holds its causal masks."""
    folder, q = oracle.folder(tmp_path / "model", "gpt2"), oracle.basis()
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, file, {"format": "pt"})
    cut(folder, tmp_path / "out")
    after = weights(tmp_path / "out")
    assert torch.equal(after["h.0.attn.bias"], tensors["h.0.attn.bias"])
    model = oracle.load(tmp_path / "out")
    assert oracle.relative(oracle.logits(model), oracle.projected_logits(oracle.load(folder), q)) < 1e-13


# as a LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "gemma2"])
def test_orthogonalisation_is_exact_as_an_adapter(tmp_path, name):
    from peft import PeftModel

    folder = oracle.folder(tmp_path / "model", name, torch.float32)
    made = adapter(folder, tmp_path / "adapter", oracle.basis())
    assert made.rank == 2 and set(made.errors.values()) == {0.0} and len(made.errors) == 7
    cut(folder, tmp_path / "out")
    base = oracle.load(folder, torch.float32)
    untouched = oracle.logits(base)
    adapted = oracle.logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    expected = oracle.logits(oracle.load(tmp_path / "out", torch.float32))
    assert oracle.relative(adapted, expected) < 1e-5 < 1e-2 < oracle.relative(untouched, expected)


def test_norm_preserving_adapters_tell_what_they_lose(tmp_path):
    from peft import PeftModel

    folder = oracle.folder(tmp_path / "model", "llama", torch.float32)
    few = adapter(folder, tmp_path / "few", oracle.basis(), "norm_rows", rank=3)
    all_of_it = adapter(folder, tmp_path / "all", oracle.basis(), "norm_rows", rank=oracle.WIDTH)
    assert len(few.errors) == 6 and all(0.01 < e < 1 for e in few.errors.values())
    assert all(e < 1e-5 for e in all_of_it.errors.values())
    cut(folder, tmp_path / "out", "norm_rows")
    base = oracle.load(folder, torch.float32)
    expected = oracle.logits(oracle.load(tmp_path / "out", torch.float32))
    adapted = oracle.logits(PeftModel.from_pretrained(base, str(tmp_path / "all")))
    assert oracle.relative(adapted, expected) < 1e-5
    # the error returned is that of the factors that were written
    factors = load_file(tmp_path / "few" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    product = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    change = (weights(tmp_path / "out")[f"{name}.weight"] - weights(folder)[f"{name}.weight"]).double()
    assert few.errors[name] == pytest.approx(oracle.relative(product.double(), change), rel=1e-3)


def test_what_no_adapter_can_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"c_proj.bias is a bias with a part along"):
        adapter(oracle.folder(tmp_path / "gpt2", "gpt2"), tmp_path / "out", oracle.basis())
    moe = oracle.folder(tmp_path / "moe", "mixtral")
    with pytest.raises(ValueError, match=r"experts.0.w2.weight is no linear map"):
        adapter(moe, tmp_path / "out", oracle.basis())
    with pytest.raises(ValueError, match="at least the 2 directions, got 1"):
        adapter(moe, tmp_path / "out", oracle.basis(), "norm_columns", rank=1)
    assert not (tmp_path / "out").exists()

"""Every method equals its plain form, in whatever shards and dtypes the models come, and says what it refuses."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from fastguard.edits.stream import RECORD
from fastguard.merging import METHODS, Model, arithmetic, merge
from fastguard.merging.options import OPTIONS
from fastguard.settings import SettingError
from merging import folders, plain


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return folders.family(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    """So that tiny tensors, too, are merged in more than one portion."""
    monkeypatch.setattr(arithmetic, "PORTION", 256)


def by_name(one, *roles):
    return {k: one(k, *(r[k] for r in roles)) for k in roles[0]}


def safe_lora(w, make, pick):
    """Plainly: all modules' cosines, and the weights with those that ``pick`` takes projected."""
    names = [k for k, t in w["model"].items() if t.dim() == 2 and ".layers." in k]
    delta = {k: w["model"][k] - w["aligned"][k] for k in names}
    turned = {k: make(w["aligned"][k], w["base"][k]) @ delta[k] for k in names}
    cosines = {k: plain.cosine(turned[k], delta[k]) for k in names}
    chosen = pick(cosines)
    return {k: w["aligned"][k] + turned[k] if k in chosen else t for k, t in w["model"].items()}


def lowest(count):
    return lambda cosines: sorted(cosines, key=cosines.get)[:count]


TWO = [("model", 0.7, 0.4), ("other", -0.2, 0.8)]
CASES = {
    # name: (method, how it is called, the plain form)
    "linear": ("linear", dict(models=TWO), lambda w: by_name(
        lambda k, a, b: plain.linear([a, b], [0.7, -0.2]), w["model"], w["other"])),
    "linear, not normalised": ("linear", dict(models=TWO, options={"normalize": False}), lambda w: by_name(
        lambda k, a, b: plain.linear([a, b], [0.7, -0.2], False), w["model"], w["other"])),
    "slerp": ("slerp", dict(base="other", options={"t": 0.3}), lambda w: by_name(
        lambda k, a, b: plain.slerp(a, b, 0.3), w["other"], w["model"])),
    "task_arithmetic": ("task_arithmetic", dict(models=TWO, base="base", options={"lambda": 0.6}), lambda w: by_name(
        lambda k, c, a, b: plain.task_arithmetic(c, [a, b], [0.7, -0.2], 0.6), w["base"], w["model"], w["other"])),
    "ties": ("ties", dict(models=TWO, base="base", options={"lambda": 0.6}), lambda w: by_name(
        lambda k, c, a, b: plain.ties(c, [a, b], [0.7, -0.2], [0.4, 0.8], scale=0.6),
        w["base"], w["model"], w["other"])),
    "ties, summed": ("ties", dict(models=TWO, base="base", options={"normalize": False}), lambda w: by_name(
        lambda k, c, a, b: plain.ties(c, [a, b], [0.7, -0.2], [0.4, 0.8], False), w["base"], w["model"], w["other"])),
    "dare_linear": ("dare_linear", dict(models=TWO, base="base", options={"seed": 3}), lambda w: by_name(
        lambda k, c, a, b: plain.dare_linear(c, [a, b], [0.7, -0.2], [0.4, 0.8], k, 3),
        w["base"], w["model"], w["other"])),
    "dare_linear, not rescaled": ("dare_linear", dict(models=TWO, base="base", options={"rescale": False}),
        lambda w: by_name(lambda k, c, a, b: plain.dare_linear(c, [a, b], [0.7, -0.2], [0.4, 0.8], k, 0, False),
        w["base"], w["model"], w["other"])),
    "dare_ties": ("dare_ties", dict(models=TWO, base="base"), lambda w: by_name(
        lambda k, c, a, b: plain.dare_ties(c, [a, b], [0.7, -0.2], [0.4, 0.8], k),
        w["base"], w["model"], w["other"])),
    "resta": ("resta", dict(aligned="aligned", unaligned="other", options={"gamma": 0.8}), lambda w: by_name(
        lambda k, m, a, u: plain.resta(m, a, u, 0.8), w["model"], w["aligned"], w["other"])),
    "resta, DARE": ("resta", dict(aligned="aligned", unaligned="other", options={"drop": 0.3}), lambda w: by_name(
        lambda k, m, a, u: plain.resta(m, a, u, 0.5, 0.7, None, k), w["model"], w["aligned"], w["other"])),
    "resta, DARE from a base": ("resta",
        dict(aligned="aligned", unaligned="other", base="base", options={"drop": 0.3, "seed": 5}),
        lambda w: by_name(lambda k, m, a, u, b: plain.resta(m, a, u, 0.5, 0.7, b, k, 5),
        w["model"], w["aligned"], w["other"], w["base"])),
    "farn": ("farn", dict(base="aligned", options={"weight": 0.3}), lambda w: by_name(
        lambda k, a, m: 0.7 * a + 0.3 * m, w["aligned"], w["model"])),
    "farn, slerp": ("farn", dict(base="other", options={"weight": 0.3, "form": "slerp"}), lambda w: by_name(
        lambda k, a, m: plain.slerp(a, m, 0.3), w["other"], w["model"])),
    "safe_lora": ("safe_lora", dict(aligned="aligned", base="base", options={"lowest": 4}), lambda w: safe_lora(
        w, plain.published_projection, lowest(4))),
    "safe_lora, threshold": ("safe_lora", dict(aligned="aligned", base="base", options={"tau": 0.65}),
        lambda w: safe_lora(w, plain.published_projection, lambda c: [k for k, x in c.items() if x <= 0.65])),
    "safe_lora, projector": ("safe_lora",
        dict(aligned="aligned", base="base", options={"projector": True, "rank": 3, "lowest": 5}),
        lambda w: safe_lora(w, lambda a, b: plain.projector(a, b, 3), lowest(5))),
    "lox": ("lox", dict(base="base", models=[("aligned", None, None)], options={"rank": 3}), lambda w: {
        k: plain.lox(t, w["base"][k], 3, 1.25) if t.dim() > 1 else t for k, t in w["aligned"].items()}),
    "somf": ("somf", dict(base="aligned"), lambda w: by_name(
        lambda k, s, m: plain.somf(s, [m], None, 0.3, "probability", k), w["aligned"], w["model"])),
}  # fmt: skip


def call(models, method, how, out, **more):
    """The method with folders for roles."""
    given = [
        Model(models / m, w, density if method.startswith(("ties", "dare")) else None)
        for m, w, density in how.get("models", [("model", None, None)])
    ]
    roles = {role: models / how[role] for role in ("base", "aligned", "unaligned") if role in how}
    return merge(method, given, out, **roles, options=how.get("options"), **more)


@pytest.mark.parametrize("case", CASES)
def test_equals_its_plain_form(models, tmp_path, case):
    method, how, reference = CASES[case]
    call(models, method, how, tmp_path / "out")
    expected = reference({role: folders.weights(models / role) for role in folders.SHARDS})
    found = folders.stored(tmp_path / "out")
    assert found.keys() == expected.keys() and all(t.dtype == torch.float64 for t in found.values())
    assert folders.close(found, expected) < 1e-14
    # each tensor by itself, and the check sees one of them spoiled
    assert all(folders.close({k: found[k]}, {k: expected[k]}) < 1e-13 for k in expected)
    last = max(expected)
    assert folders.close({**found, last: found[last].roll(1, 0)}, expected) > 1e-4


def test_every_method_is_covered_and_has_options():
    assert {method for method, _, _ in CASES.values()} == set(METHODS) == set(OPTIONS)


@pytest.mark.parametrize("case", ["ties", "resta", "safe_lora"])
def test_what_is_written_loads_and_computes_the_merge(models, tmp_path, case):
    method, how, reference = CASES[case]
    call(models, method, how, tmp_path / "out")
    expected = folders.load(models / "base")
    expected.load_state_dict(reference({role: folders.weights(models / role) for role in folders.SHARDS}))
    layout = "base" if case == "ties" else "model"
    assert torch.allclose(folders.logits(folders.load(tmp_path / "out")), folders.logits(expected), atol=1e-10)
    assert not torch.allclose(folders.logits(folders.load(models / layout)), folders.logits(expected), atol=1e-3)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == f'{{"of": "{layout}"}}'
    names = {p.name for p in (models / layout).glob("*.safetensors*")}
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors*")} == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["linear", "ties", "resta"])
def test_one_rounding(tmp_path, case, dtype):
    """fp32 arithmetic, rounded once: within half a spacing of float64's result, and a little for fp32 itself."""
    family = folders.family(tmp_path / "models", dtype=dtype)
    method, how, reference = CASES[case]
    call(family, method, how, tmp_path / "out")
    expected = reference({role: folders.weights(family / role) for role in folders.SHARDS})
    found = folders.stored(tmp_path / "out")
    bits = torch.finfo(dtype).eps / 2
    if case == "ties" and dtype != torch.float32:  # changes that tie in float64 may not in fp32, and the other way
        close = sum(
            int(((found[k].double() - expected[k]).abs() <= 1.01 * bits * expected[k].abs() + 1e-6).sum())
            for k in found
        )
        assert close > 0.9999 * sum(t.numel() for t in found.values())
        return
    slack = 2e-6 if dtype != torch.float16 else 1e-5  # fp16's subnormals
    for k, t in found.items():
        assert t.dtype == dtype
        error = (t.double() - expected[k]).abs()
        assert bool((error <= 1.001 * bits * expected[k].abs() + slack).all()), (k, float(error.max()))


def test_small_changes_survive_bf16(tmp_path):
    """Two changes of 0.3 spacings: added one after the other in bf16 both are lost; together they are a spacing."""
    folder = folders.family(tmp_path / "models", dtype=torch.bfloat16)
    one = folders.stored(folder / "model")
    spacing = 2.0**-7
    for role, value in (("base", 1.0), ("model", 1.0 + spacing), ("other", 1.0 + spacing)):
        save = {k: torch.full_like(t, value) for k, t in one.items()}
        shutil.rmtree(folder / role)
        shutil.copytree(folder / "aligned", folder / role)
        for p in (folder / role).glob("*.safetensors*"):
            p.unlink()
        save_file(save, folder / role / "model.safetensors", {"format": "pt"})
    both = [Model(folder / "model", 0.3), Model(folder / "other", 0.3)]
    merge("task_arithmetic", both, tmp_path / "out", base=folder / "base")
    start, step = torch.ones((), dtype=torch.bfloat16), torch.tensor(0.3 * spacing, dtype=torch.bfloat16)
    assert float(start + step + step) == 1.0
    assert all(bool((t == 1.0 + spacing).all()) for t in folders.stored(tmp_path / "out").values())


def test_tied_weights_stay_tied_however_they_are_stored(tmp_path):
    family = folders.family(tmp_path / "models", "llama_tied")
    twice = load_file(family / "model" / "model.safetensors")
    assert "lm_head.weight" not in twice
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
    save_file(twice, family / "model" / "model.safetensors", {"format": "pt"})
    merge("farn", family / "model", tmp_path / "stored", base=family / "aligned")  # the layout has the head twice
    merge("slerp", family / "model", tmp_path / "once", base=family / "aligned", options={"t": 0.5})
    stored, once = folders.stored(tmp_path / "stored"), folders.stored(tmp_path / "once")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]) and "lm_head.weight" not in once
    for out in ("stored", "once"):
        loaded = folders.load(tmp_path / out)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert folders.config(tmp_path / out)["tie_word_embeddings"] is True
    w = {role: folders.weights(family / role) for role in ("model", "aligned")}
    expected = 0.5 * (w["model"]["model.embed_tokens.weight"] + w["aligned"]["model.embed_tokens.weight"])
    assert torch.allclose(stored["model.embed_tokens.weight"], expected, atol=1e-15)


def test_experts_and_transposed_matrices(tmp_path):
    family = folders.family(tmp_path / "moe", "mixtral")
    merge("lox", family / "aligned", tmp_path / "out", base=family / "base", options={"rank": 2})
    w = {role: folders.weights(family / role) for role in ("aligned", "base")}
    expected = {k: plain.lox(t, w["base"][k], 2, 1.25) if t.dim() > 1 else t for k, t in w["aligned"].items()}
    assert folders.close(folders.stored(tmp_path / "out"), expected) < 1e-13
    gpt2 = folders.family(tmp_path / "gpt2", "gpt2")
    merge("farn", gpt2 / "model", tmp_path / "gpt2 out", base=gpt2 / "aligned")
    folders.load(tmp_path / "gpt2 out")
    with pytest.raises(ValueError, match="transposed, which safe_lora does not read"):
        merge("safe_lora", gpt2 / "model", tmp_path / "no", aligned=gpt2 / "aligned", base=gpt2 / "base")


def test_safe_lora_says_what_it_saw(models, tmp_path):
    done = call(models, *CASES["safe_lora"][:2], tmp_path / "out")
    w = {role: folders.weights(models / role) for role in ("model", "aligned", "base")}
    name = "model.layers.1.mlp.down_proj.weight"
    change = w["model"][name] - w["aligned"][name]
    turned = plain.published_projection(w["aligned"][name], w["base"][name]) @ change
    assert done.cosines[name] == pytest.approx(plain.cosine(turned, change), rel=1e-12) and len(done.cosines) == 21
    assert len(done.projected) == 4 == done.written.edited
    assert max(done.cosines[p] for p in done.projected) <= min(
        set(done.cosines.values()) - {done.cosines[p] for p in done.projected}
    )
    only = merge("safe_lora", models / "model", tmp_path / "some", aligned=models / "aligned", base=models / "base",
                 options={"modules": ["q_proj", "v_proj"], "tau": 1.0})  # fmt: skip
    assert len(only.projected) == 6 and all("q_proj" in p or "v_proj" in p for p in only.projected)
    untouched = folders.stored(tmp_path / "some")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(untouched, w["model"]["model.layers.0.mlp.up_proj.weight"])


def test_the_true_projector_wants_a_rank_where_alignment_changed_everything(models, tmp_path):
    with pytest.raises(ValueError, match="rank: expected one with projector"):
        merge("safe_lora", models / "model", tmp_path / "out", aligned=models / "aligned", base=models / "base",
              options={"projector": True})  # fmt: skip
    family = folders.family(tmp_path / "low", rank=2)
    merge("safe_lora", family / "model", tmp_path / "out", aligned=family / "aligned", base=family / "base",
          options={"projector": True, "tau": 1.0})  # fmt: skip
    w = {role: folders.weights(family / role) for role in ("model", "aligned", "base")}
    expected = safe_lora(w, lambda a, b: plain.projector(a, b, 2), list)
    assert folders.close(folders.stored(tmp_path / "out"), expected) < 1e-10


@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_a_killed_merge_is_taken_up_with_the_same_bits(models, tmp_path, method):
    how = CASES[method][1]
    call(models, method, how, tmp_path / "unbroken")
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            calls = []

            def dying(stage, fraction, text):
                calls.append(text)
                if len(set(calls)) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            call(models, method, how, tmp_path / "out", progress=dying)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (tmp_path / "out" / "config.json").exists() and len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    done = call(models, method, how, tmp_path / "out")
    assert done.written.kept == 2 < done.written.shards
    for name in ("config.json", "README.md", *(p.name for p in (tmp_path / "unbroken").glob("*.safetensors"))):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


def test_another_model_under_the_same_path_is_merged_anew(models, tmp_path):
    mine = shutil.copytree(models, tmp_path / "models")
    how = CASES["resta"][1]
    call(mine, "resta", how, tmp_path / "out")
    assert call(mine, "resta", how, tmp_path / "out").written.kept == 1
    shutil.rmtree(mine / "other")
    shutil.copytree(mine / "base", mine / "other")
    assert call(mine, "resta", how, tmp_path / "out").written.kept == 0
    w = {role: folders.weights(mine / role) for role in ("model", "aligned", "other")}
    expected = by_name(lambda k, m, a, u: plain.resta(m, a, u, 0.8), w["model"], w["aligned"], w["other"])
    assert folders.close(folders.stored(tmp_path / "out"), expected) < 1e-14
    with pytest.raises(FileExistsError, match="another edit"):
        call(mine, "resta", {**how, "options": {"gamma": 0.7}}, tmp_path / "out")


def test_another_dtype(models, tmp_path):
    call(models, *CASES["safe_lora"][:2], tmp_path / "out", dtype="bfloat16")
    call(models, *CASES["safe_lora"][:2], tmp_path / "wide")
    narrow, wide = folders.stored(tmp_path / "out"), folders.stored(tmp_path / "wide")
    assert all(torch.equal(narrow[k], t.bfloat16()) for k, t in wide.items())
    assert folders.config(tmp_path / "out")["dtype"] == "bfloat16"
    folders.load(tmp_path / "out", torch.bfloat16)
    total = sum(t.nbytes for t in narrow.values())
    call(models, *CASES["ties"][:2], tmp_path / "many", dtype="bfloat16")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total


def test_the_record_and_the_card_say_where_it_comes_from(models, tmp_path, monkeypatch):
    mine = shutil.copytree(models, tmp_path / "models")
    (mine / "model" / "README.md").write_text(
        "---\nlicense: apache-2.0\ntags:\n- chat\n---\n\n# Mine\n\nIts own words.\n"
    )
    call(mine, *CASES["resta"][:2], tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["edit"]["name"] == "resta" and record["edit"]["options"]["gamma"] == 0.8
    assert record["source"] == str(mine / "model")
    assert record["beside"] == {"aligned": str(mine / "aligned"), "unaligned": str(mine / "other")}
    (shard,) = record["shards"].values()
    assert len({shard["sha256"], *shard["beside"].values()}) == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\ntags:\n- chat\n- merge\n---\n\n# Mine\n\nIts own words.\n")
    for said in (
        "## resta",
        "gamma: `0.8`",
        str(mine / "other"),
        shard["beside"]["unaligned"][:12],
        shard["sha256"][:12],
    ):
        assert said in card, said


BAD = {
    "unknown": ("breadcrumbs", {}, ValueError, "method: expected one of linear, slerp"),
    "option": ("resta", dict(aligned="aligned", unaligned="other", options={"lamda": 1}), ValueError,
               "lamda: unknown key; expected one of gamma"),
    "range": ("resta", dict(aligned="aligned", unaligned="other", options={"drop": 1}), SettingError, "drop: expected"),
    "both": ("safe_lora", dict(aligned="aligned", base="base", options={"tau": 0.5, "lowest": 3}), SettingError,
             "tau or lowest"),
    "role": ("resta", dict(aligned="aligned"), ValueError, "unaligned: resta needs a model as unaligned"),
    "more roles": ("linear", dict(base="base"), ValueError, "base: linear reads none"),
    "count": ("slerp", dict(base="base", models=[("model", None, None), ("other", None, None)]), ValueError,
              "model: expected 1 for slerp, got 2"),
    "parameter": ("slerp", dict(base="base", models=[("model", 0.5, None)]), SettingError, "weight: expected none"),
    "density": ("ties", dict(base="base", models=[("model", 1.0, 1.5)]), SettingError,
                "density: expected a number from 0 to 1"),
    "no weights": ("linear", dict(models=[("model", 1.0, None), ("other", -1.0, None)]), ValueError,
                   "do not add up to 0"),
    "nowhere": ("farn", dict(base="nowhere"), FileNotFoundError, "base: .*there is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_named_and_leave_nothing(models, tmp_path, case):
    method, how, kind, said = BAD[case]
    with pytest.raises(kind, match=said):
        call(models, method, how, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_models_that_do_not_fit_are_named(models, tmp_path):
    def refused(kind, said, other, **changes):
        folders.family(tmp_path / said[:4] / "m", other, **changes)
        with pytest.raises(kind, match=said):
            merge("farn", models / "model", tmp_path / "out", base=tmp_path / said[:4] / "m" / "base")

    refused(ValueError, r"is a mistral, expected a llama", "mistral")
    refused(
        ValueError, r"\[101, 32\] in .*, expected \[97, 32\] .*do their vocabularies differ", "llama", vocab_size=101
    )
    refused(ValueError, r"lacks of .* 9 tensors, the first 'model.layers.2", "llama", num_hidden_layers=2)
    refused(ValueError, r"has beside those of .* 9 tensors, the first 'model.layers.3", "llama", num_hidden_layers=4)
    mine = shutil.copytree(models, tmp_path / "models")
    tensors = load_file(mine / "model" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, mine / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TypeError, match=r"'model.norm.weight' .* is stored as F8_E4M3"):
        merge("farn", mine / "model", tmp_path / "out", base=mine / "base")
    quantised = {**folders.config(mine / "base"), "quantization_config": {"quant_method": "gptq"}}
    (mine / "base" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(TypeError, match=r"base: .* is quantised"):
        merge("farn", mine / "aligned", tmp_path / "out", base=mine / "base")
    assert not (tmp_path / "out").exists()
    for place in (models / "aligned", models):
        with pytest.raises(ValueError, match="which is read"):
            merge("farn", models / "model", place, base=models / "aligned", overwrite=True)


def test_what_is_not_finite_is_not_written(tmp_path):
    family = folders.family(tmp_path / "models", dtype=torch.float16)
    with pytest.raises(FloatingPointError, match=r"model\..*: expected weights that torch.float16 holds, got"):
        merge("task_arithmetic", Model(family / "model", 1e7), tmp_path / "out", base=family / "base")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_old_buffers_are_kept_and_not_asked_for(models, tmp_path):
    mine = shutil.copytree(models, tmp_path / "models")
    tensors = load_file(mine / "model" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    tensors["model.layers.0.steps"] = torch.tensor(3)
    save_file(tensors, mine / "model" / "model.safetensors", {"format": "pt"})
    merge("farn", mine / "model", tmp_path / "out", base=mine / "base")
    found = folders.stored(tmp_path / "out")
    assert found["model.layers.0.self_attn.rotary_emb.inv_freq"].tolist() == [0, 1, 2, 3]
    assert int(found["model.layers.0.steps"]) == 3


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_memory_is_that_of_a_tensor_a_model(tmp_path, monkeypatch, method):
    from edits.test_stream import _peak_growth

    monkeypatch.undo()  # portions as they are
    mib = 2**20
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        tensors = {f"w{i}": torch.full((1024, 8 * 1024), 1.0 + i, dtype=torch.bfloat16) for i in range(6)}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    base = None if method == "linear" else tmp_path / "a"
    options = {} if method == "linear" else {"density": 0.5}
    models = [tmp_path / name for name in "abc"[-2 if base else -3 :]]
    merge(method, models, tmp_path / "first", base=base, options=options)  # what the libraries set up once
    growth = _peak_growth(lambda: merge(method, models, tmp_path / "out", base=base, options=options))
    assert growth < (3 * 16 + 40) * mib, f"{growth / mib:.0f} MiB; a tensor has 16, a model 96"

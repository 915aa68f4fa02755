"""SOMF: the merge equals its formula, on models and adapters; the mask's gradient too, and it learns what harms."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from fastguard.edits.stream import RECORD
from fastguard.merging import Model, SubspaceMask, arithmetic, merge
from fastguard.merging.drop import keep
from fastguard.settings import SettingError
from merging import folders, plain


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    """So that tiny tensors, too, are merged in more than one portion."""
    monkeypatch.setattr(arithmetic, "PORTION", 256)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = folders.family(tmp_path_factory.mktemp("models"))
    g = torch.Generator().manual_seed(3)
    logits = {k: 2 * torch.randn(t.shape, generator=g) for k, t in folders.weights(path / "base").items()}
    del logits["model.norm.weight"]  # whose change is merged whole
    save_file(logits, path / "masks.safetensors")
    return path


def run(models, out, tasks=("model", "other"), **options):
    how = {k: options.pop(k) for k in ("progress", "overwrite", "dtype") if k in options}
    return merge("somf", [models / t for t in tasks], out, base=models / "aligned", options=options, **how)


def expected(models, coefficient=0.3, export="probability", seed=0):
    w = {role: folders.weights(models / role) for role in ("aligned", "model", "other")}
    logits = load_file(models / "masks.safetensors")
    return {
        k: plain.somf(t, [w["model"][k], w["other"][k]], logits.get(k), coefficient, export, k, seed)
        for k, t in w["aligned"].items()
    }


@pytest.mark.parametrize("export", ["probability", "binary", "threshold"])
def test_equals_its_plain_form(models, tmp_path, export):
    run(models, tmp_path / "out", coefficient=0.4, masks=models / "masks.safetensors", export=export, seed=7)
    reference = expected(models, 0.4, export, 7)
    found = folders.stored(tmp_path / "out")
    assert found.keys() == reference.keys()
    assert all(folders.close({k: found[k]}, {k: reference[k]}) < 1e-12 for k in reference)
    for spoiled in (
        {k: t.flip(0) for k, t in found.items()},
        {k: t.roll(1, -1) for k, t in found.items()},
        {**found, "lm_head.weight": 2 * found["lm_head.weight"]},
        expected(models, 0.4, export, 8) if export == "binary" else expected(models, 0.41, export, 7),
        expected(models, 0.4, {"probability": "binary", "binary": "threshold", "threshold": "probability"}[export], 7),
    ):
        assert folders.close(spoiled, reference) > 1e-4
    folders.load(tmp_path / "out")


def test_equal_logits_and_none_are_plain_task_arithmetic(models, tmp_path):
    run(models, tmp_path / "none")
    same = {k: torch.full(t.shape, -1.5) for k, t in folders.weights(models / "aligned").items()}
    save_file(same, tmp_path / "same.safetensors")
    run(models, tmp_path / "same", masks=str(tmp_path / "same.safetensors"))
    merge("task_arithmetic", [Model(models / t, 0.3) for t in ("model", "other")], tmp_path / "plain",
          base=models / "aligned")  # fmt: skip
    arithmetic_ = folders.stored(tmp_path / "plain")
    for name in ("none", "same"):
        assert folders.close(folders.stored(tmp_path / name), arithmetic_) < 1e-14, name
    run(models, tmp_path / "nothing", masks=str(tmp_path / "same.safetensors"), export="threshold")
    safe, left = folders.weights(models / "aligned"), folders.stored(tmp_path / "nothing")
    assert all(torch.equal(left[k], t) for k, t in safe.items())


def test_a_draw_is_one_of_the_probabilities():
    probability = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    kept = keep(100_001, 0, probability, seed=1, tensor="w", model=0)
    assert not kept[0] and kept[-1]
    for part, p in zip(kept.double().chunk(10), probability.chunk(10), strict=True):
        assert abs(float(part.mean() - p.mean())) < 5 * 0.5 / len(p) ** 0.5
    assert torch.equal(kept[400:], keep(99_601, 400, probability[400:], seed=1, tensor="w", model=0))
    same = keep(1000, 0, torch.full((1000,), 0.3, dtype=torch.float64), seed=1, tensor="w", model=0)
    assert torch.equal(same, keep(1000, 0, 0.3, seed=1, tensor="w", model=0))


def test_a_killed_merge_is_taken_up_with_the_same_bits(models, tmp_path):
    how = dict(masks=models / "masks.safetensors", export="binary", seed=5)

    def merged(out, **more):  # of layout ``other``, which has the most shards
        return merge("somf", models / "model", out, base=models / "other", options=how, **more)

    merged(tmp_path / "unbroken")
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            calls = []

            def dying(stage, fraction, text):
                calls.append(text)
                if len(set(calls)) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

            merged(tmp_path / "out", progress=dying)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (tmp_path / "out" / "config.json").exists() and len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    done = merged(tmp_path / "out")
    assert done.written.kept == 2 < done.written.shards
    for name in ("config.json", "README.md", *(p.name for p in (tmp_path / "unbroken").glob("*.safetensors"))):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


def test_another_masks_file_is_another_merge(models, tmp_path):
    file = shutil.copy(models / "masks.safetensors", tmp_path / "masks.safetensors")
    run(models, tmp_path / "out", masks=file)
    assert run(models, tmp_path / "out", masks=file).written.kept > 0
    said = json.loads((tmp_path / "out" / RECORD).read_text())["edit"]["options"]["masks"]
    assert said.startswith("masks.safetensors, SHA-256 ") and said in (tmp_path / "out" / "README.md").read_text()
    save_file({k: t + 1 for k, t in load_file(file).items()}, file)
    with pytest.raises(FileExistsError, match="another edit"):
        run(models, tmp_path / "out", masks=file)


def spoiled_masks(path, models, kind):
    logits = load_file(models / "masks.safetensors")
    if kind == "name":
        logits["model.layers.9.w"] = torch.zeros(3)
    elif kind == "shape":
        logits["lm_head.weight"] = logits["lm_head.weight"][1:]
    elif kind == "dtype":
        logits["lm_head.weight"] = logits["lm_head.weight"].int()
    elif kind == "nan":
        logits["lm_head.weight"][-1, -1] = torch.nan
    save_file({} if kind == "empty" else logits, path)
    if kind == "half":
        path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("name", r"masks: expected tensors of the model alone.* 'model.layers.9.w' \[3\]"),
        ("shape", r"masks: expected \[97, 32\] in floating point, got 'lm_head.weight' \[96, 32\]"),
        ("dtype", "masks: expected .* in floating point, got 'lm_head.weight' .* I32"),
        ("nan", "masks: expected finite logits for lm_head.weight"),
        ("empty", "masks: expected logits by tensor"),
        ("half", "masks: .* is it half of a file"),
    ],
)
def test_masks_that_do_not_fit_are_named(models, tmp_path, kind, said):
    spoiled_masks(tmp_path / "masks.safetensors", models, kind)
    with pytest.raises(ValueError, match=said):
        run(models, tmp_path / "out", masks=tmp_path / "masks.safetensors")
    assert not (tmp_path / "out" / "config.json").exists()


def test_bad_calls_are_named(models, tmp_path):
    with pytest.raises(SettingError, match="export: expected probability or binary or threshold, got 'random'"):
        run(models, tmp_path / "out", export="random")
    with pytest.raises(SettingError, match="coefficient: expected a number that is finite"):
        run(models, tmp_path / "out", coefficient=float("inf"))
    with pytest.raises(FileNotFoundError, match="masks: there is no file"):
        run(models, tmp_path / "out", masks="nowhere.safetensors")
    with pytest.raises(ValueError, match="base: somf needs a model as base"):
        merge("somf", models / "model", tmp_path / "out")
    with pytest.raises(SettingError, match="weight: expected none of a model, since somf reads none"):
        merge("somf", Model(models / "model", 0.5), tmp_path / "out", base=models / "aligned")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    shutil.copy(models / "masks.safetensors", tmp_path / "out" / "masks.safetensors")
    with pytest.raises(ValueError, match="which is read"):
        run(models, tmp_path / "out", masks=tmp_path / "out" / "masks.safetensors", overwrite=True)
    assert (tmp_path / "out" / "masks.safetensors").exists()


# adapters -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    peft = pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("adapters")
    g = torch.Generator().manual_seed(2)
    for name in ("safe", "one", "two"):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        lora = peft.get_peft_model(folders.load(models / "base"), config).double()
        with torch.no_grad():
            for p in (p for n, p in lora.named_parameters() if "lora_" in n):
                p.copy_(0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64))
        lora.save_pretrained(path / name)
    tensors = load_file(path / "safe" / "adapter_model.safetensors")
    save_file({k: torch.randn(t.shape, generator=g) for k, t in tensors.items()}, path / "masks.safetensors")
    return path


def merged_adapters(adapters, out, **more):
    return merge("somf", [adapters / "one", adapters / "two"], out, base=adapters / "safe",
                 options={"masks": str(adapters / "masks.safetensors"), "export": "binary"}, **more)  # fmt: skip


def test_adapters_are_merged_factor_by_factor(models, adapters, tmp_path):
    import peft

    merged_adapters(adapters, tmp_path / "out")
    w = {n: load_file(adapters / n / "adapter_model.safetensors") for n in ("safe", "one", "two")}
    masks, found = load_file(adapters / "masks.safetensors"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    reference = {
        k: plain.somf(t, [w["one"][k], w["two"][k]], masks[k], 0.3, "binary", k, 0) for k, t in w["safe"].items()
    }
    assert found.keys() == reference.keys() and folders.close(found, reference) < 1e-12
    assert folders.close({k: t.roll(1, 0) for k, t in found.items()}, reference) > 1e-3
    assert not (tmp_path / "out" / "config.json").exists()
    loaded = peft.PeftModel.from_pretrained(folders.load(models / "base"), tmp_path / "out")
    key = "base_model.model.model.layers.1.self_attn.v_proj"
    change = 2 * reference[f"{key}.lora_B.weight"] @ reference[f"{key}.lora_A.weight"]
    start = folders.weights(models / "base")["model.layers.1.self_attn.v_proj.weight"]
    weight = loaded.merge_and_unload().state_dict()["model.layers.1.self_attn.v_proj.weight"]
    assert torch.allclose(weight, start + change, atol=1e-12)
    assert merged_adapters(adapters, tmp_path / "out").written.kept == 1


def test_a_mask_of_an_adapter_in_memory_fits_its_file(models, adapters, tmp_path):
    import peft

    def factors(name):
        lora = peft.PeftModel.from_pretrained(folders.load(models / "base"), adapters / name)
        return lora, {n: p.detach() for n, p in lora.named_parameters() if "lora_" in n}

    (lora, safe), (_, task) = factors("safe"), factors("one")
    mask = SubspaceMask(safe, [{n: task[n] - t for n, t in safe.items()}], adapter="default")
    tokens = torch.randint(3, 97, (2, 11))
    mask.loss(lora, {"input_ids": tokens, "labels": tokens}, step=0).backward()
    with torch.no_grad():
        for p in mask.parameters():
            assert p.grad.any()
            p.sub_(p.grad.sign())
    mask.save(tmp_path / "masks.safetensors")
    merge("somf", adapters / "one", tmp_path / "out", base=adapters / "safe",
          options={"masks": tmp_path / "masks.safetensors", "export": "binary", "seed": 3})  # fmt: skip
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    inside = {n.replace(".default", ""): t for n, t in mask.merged("binary", 3)}
    assert found.keys() == inside.keys() and folders.close(found, inside) < 1e-14
    with pytest.raises(SettingError, match="export: expected"):
        next(mask.merged("binari"))
    lora.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="model: expected one without gradient checkpointing"):
        mask.loss(lora, {"input_ids": tokens, "labels": tokens}, step=1)


def test_adapters_of_another_kind_are_named(models, adapters, tmp_path):
    with pytest.raises(ValueError, match="dtype: expected none of an adapter"):
        merged_adapters(adapters, tmp_path / "out", dtype="float32")
    with pytest.raises(ValueError, match="model: expected adapters alone or whole models alone"):
        merge("somf", models / "model", tmp_path / "out", base=adapters / "safe")
    with pytest.raises(FileNotFoundError, match="merge them first"):
        merge("task_arithmetic", adapters / "one", tmp_path / "out", base=adapters / "safe")
    mine = shutil.copytree(adapters, tmp_path / "adapters")
    config = json.loads((mine / "two" / "adapter_config.json").read_text())
    (mine / "two" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    with pytest.raises(ValueError, match=r"model 2: .* has lora_alpha = 16, expected 8"):
        merged_adapters(mine, tmp_path / "out")
    (mine / "safe" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"base: .* has no adapter_model.safetensors"):
        merged_adapters(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the mask -------------------------------------------------------------------------------------------------------------


def linear_loss(call, batch):
    x, y = batch
    return (call(x) - y).square().mean()


def layer(tasks=1, dtype=torch.float64, **more):
    g = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(8, 6, dtype=dtype).requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g, dtype=dtype))
    deltas = [{"weight": torch.randn(6, 8, generator=g, dtype=dtype)} for _ in range(tasks)]
    return model, SubspaceMask(dict(model.named_parameters()), deltas, objective=linear_loss, **more), deltas, g


def test_loss_and_gradient_are_those_of_the_formula():
    model, mask, deltas, g = layer(2, coefficient=0.7, temperature=0.8, seed=4)
    assert [p.dtype for p in mask.parameters()] == [torch.float32] and not mask.logits["weight"].any()
    mask.double()
    with torch.no_grad():
        mask.logits["weight"].copy_(torch.randn(6, 8, generator=g, dtype=torch.float64))
    x, y = torch.randn(5, 8, generator=g, dtype=torch.float64), torch.randn(5, 6, generator=g, dtype=torch.float64)
    loss = mask.loss(model, (x, y), step=3)
    loss.backward()
    # by hand: dL/dW, then through s = m / mean(m) and m = sigmoid((logits + noise) / T)
    noise, delta = mask.draw("weight", 3), deltas[0]["weight"] + deltas[1]["weight"]
    m = 1 / (1 + torch.exp(-(mask.logits["weight"].detach() + noise) / 0.8))
    weight = model.weight + 0.7 * delta * m / m.mean()
    error = x @ weight.T + model.bias - y
    assert loss.item() == pytest.approx(float((error**2).mean()), rel=1e-13)
    upstream = 0.7 * delta * (2 * error.T @ x / error.numel())
    by_m = upstream / m.mean() - (upstream * m).sum() / (m.numel() * m.mean() ** 2)
    by_logits = by_m * m * (1 - m) / 0.8
    found = mask.logits["weight"].grad
    assert float((found - by_logits).norm() / by_logits.norm()) < 1e-12
    without_mean = upstream / m.mean() * m * (1 - m) / 0.8
    for spoiled in (0 * found, found / 2, found.roll(1, 0), found.roll(1, 1), without_mean):
        assert float((spoiled - by_logits).norm() / by_logits.norm()) > 1e-2
    assert model.weight.grad is None


def test_draws_are_a_function_of_the_step_and_relaxed_bernoulli():
    _, mask, _, _ = layer()
    one = mask.draw("weight", 1)
    state = torch.get_rng_state()
    assert torch.equal(mask.draw("weight", 1), one) and not torch.equal(mask.draw("weight", 2), one)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(layer(seed=1)[1].draw("weight", 1), one)
    big = SubspaceMask({"w": torch.zeros(400, 500)}, [{"w": torch.zeros(400, 500)}])
    noise = big.draw("w", 0).double()
    assert noise.isfinite().all()
    for level in (-2.0, 0.0, 1.5):  # P(noise > -l) = sigmoid(l)
        share = float((noise + level > 0).double().mean())
        assert abs(share - float(torch.tensor(level).sigmoid())) < 5 * 0.5 / 200_000**0.5


def test_it_learns_to_drop_what_harms_and_the_merge_equals_it(tmp_path):
    """A task changed columns 0-3, for its inputs, and 4-7, where the safe model's answers are to stay."""
    model, _, deltas, g = layer(dtype=torch.float32)
    deltas[0]["weight"] += deltas[0]["weight"].sign()  # each large enough to do harm
    mask = SubspaceMask(dict(model.named_parameters()), deltas, coefficient=1.0, objective=linear_loss, seed=2)
    safe = {k: p.clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.Adam(mask.parameters(), lr=0.05)
    for step in range(400):
        x = torch.randn(16, 8, generator=g)
        x[:, :4] = 0
        optimizer.zero_grad()
        mask.loss(model, (x, model(x)), step=step).backward()
        optimizer.step()
    assert all(torch.equal(p, safe[k]) for k, p in model.named_parameters())
    x = torch.randn(100, 8, generator=g).mul_(torch.arange(8) >= 4)
    moved = (dict(mask.merged())["weight"] - safe["weight"], deltas[0]["weight"])
    harm, before = (float((x @ change.T).square().mean()) for change in moved)
    assert harm < 0.02 * before
    probability = mask.logits["weight"].detach().sigmoid()
    assert float(probability[:, :4].min()) > 0.9 and float(probability[:, 4:].max()) < 0.2
    file = tmp_path / "masks" / "masks.safetensors"
    mask.save(file)
    assert torch.equal(load_file(file)["weight"], mask.logits["weight"].detach())
    for role, weight in (("safe", safe["weight"]), ("task", safe["weight"] + deltas[0]["weight"])):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text("{}")
        save_file({"weight": weight, "bias": safe["bias"]}, tmp_path / role / "model.safetensors", {"format": "pt"})
    for export in ("probability", "binary", "threshold"):
        options = {"masks": str(file), "coefficient": 1.0, "export": export, "seed": 9}
        merge("somf", tmp_path / "task", tmp_path / export, base=tmp_path / "safe", options=options)
        found, inside = folders.stored(tmp_path / export)["weight"], dict(mask.merged(export, 9))["weight"]
        assert torch.allclose(found, inside, rtol=0, atol=2e-6), export
    kept = (found - safe["weight"]) / deltas[0]["weight"]
    assert torch.allclose(kept[:, :4], torch.full((6, 4), 2.0), atol=1e-4) and not kept[:, 4:].any()


def test_tied_weights_and_half_precision(tmp_path):
    from tiny_models import tiny

    model = tiny("llama_tied", torch.bfloat16).requires_grad_(False)
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    deltas = {n: torch.randn(p.shape) for n, p in model.named_parameters() if n in names}
    mask = SubspaceMask(dict(model.named_parameters()), [deltas])
    tokens = torch.randint(3, 97, (2, 11))
    mask.loss(model, {"input_ids": tokens, "labels": tokens}, step=0).backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in mask.parameters())
    assert {t.dtype for t in mask.weights(0).values()} == {torch.bfloat16}
    # what is left of nothing is the safe model
    with torch.no_grad():
        mask.logits[names[1]].fill_(-200)
    assert torch.equal(mask.weights(0)[names[1]], model.get_parameter(names[1]))


def test_what_a_mask_cannot_be_made_of_is_named():
    safe, delta = {"w": torch.zeros(3, 4)}, {"w": torch.ones(3, 4)}
    for said, arguments, more in (
        ("coefficient: expected a finite", (safe, [delta]), {"coefficient": float("nan")}),
        ("temperature: expected a number > 0", (safe, [delta]), {"temperature": 0.0}),
        ("deltas: expected at least one", (safe, []), {}),
        ("deltas: expected at least one, and all of the same", (safe, [delta, {"v": torch.ones(3, 4)}]), {}),
        ("safe: expected 'w', which the deltas name", ({}, [delta]), {}),
        (r"deltas: expected \[3, 4\] in floating point for 'w', got \[4\]", (safe, [{"w": torch.ones(4)}]), {}),
        ("got .* torch.int64", (safe, [{"w": torch.ones(3, 4).long()}]), {}),
    ):
        with pytest.raises(ValueError, match=said):
            SubspaceMask(*arguments, **more)
    with pytest.raises(ValueError, match=r"model: expected a parameter 'w' of \[3, 4\]"):
        SubspaceMask(safe, [delta]).loss(torch.nn.Linear(4, 3), None, step=0)

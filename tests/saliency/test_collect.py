"""`Collect` against the published scores, written out one sample at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastguard.ops.abs_weight_grad import abs_weight_grad_
from fastguard.saliency import Collect, Scores
from fastguard.saliency.sums import BACKWARD, STATISTICS
from saliency.batches import batches
from saliency.published import inputs, per_sample_gradients, sums
from tiny_models import tiny


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def collected(model, given, **options):
    collect = Collect(model, STATISTICS, **options)
    try:
        for batch in given:
            collect.add(batch)
        return collect.scores()
    finally:
        collect.close()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gemma2", "phi", "gpt_neox", "cohere", "opt"])
def test_equals_the_published_scores_sample_by_sample(name):
    """All weights, the vocabulary's too: tied, untied, scaled by the model (Gemma 2), biased, of parallel layers."""
    model, given = tiny(name, torch.float64), batches()
    before = copy.deepcopy(model.state_dict())
    scores = collected(model, given, vocabulary=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    expected, rows = sums(model, given), inputs(model, given, answers=True)
    # Gemma 2 takes norms and angles in float32, and the sizes of a batch change their rounding
    tolerance = 1e-6 if name == "gemma2" else 1e-12
    for kind in BACKWARD:
        for weight in scores.names:
            assert relative(scores.statistic(kind, weight), expected[kind][weight]) < tolerance, (kind, weight)
    for weight, x in rows.items():
        assert relative(scores.statistic("wanda", weight), x.square().sum(0)) < tolerance
        assert relative(scores.statistic("gram", weight), x.T @ x) < tolerance
    assert (scores.samples, scores.answer_tokens) == (6, sum(int((b["labels"] != -100).sum()) for b in given))


def test_a_spoiled_score_is_told():
    """What tells `Collect` from the batched gradient, and from a sum that counts padding."""
    model, given = tiny("llama", torch.float64), batches()
    scores, expected = collected(model, given), sums(model, given)["snip"]
    name = scores.names[3]
    assert relative(collected(model, given).statistic("signed", name).abs(), expected[name]) > 0.1
    unmasked = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in given]
    assert relative(collected(model, unmasked).statistic("gram", name), scores.statistic("gram", name)) < 1e-12
    assert relative(collected(model, given[:1]).statistic("snip", name), expected[name]) > 0.1
    assert (
        relative(collected(model, given, tokens="all").statistic("wanda", name), scores.statistic("wanda", name)) > 0.1
    )


def test_all_tokens_are_those_that_the_mask_keeps():
    model, given = tiny("llama", torch.float64), batches()
    scores = collected(model, given, tokens="all")
    for weight, x in inputs(model, given, answers=False).items():
        assert relative(scores.statistic("wanda", weight), x.square().sum(0)) < 1e-12
    assert scores.input_tokens == sum(int(b["attention_mask"].sum()) for b in given)


def test_padding_on_either_side_and_packing_into_batches_do_not_matter():
    model = tiny("llama", torch.float64)
    results = []
    for side in ("left", "right"):
        given = batches(side=side)
        for batch in given:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        results.append(collected(model, given))
    one_by_one = [{key: value[b : b + 1] for key, value in batch.items()} for batch in batches() for b in range(3)]
    results.append(collected(model, one_by_one))
    for other in results[1:]:
        for kind in STATISTICS:
            for name in results[0].names:
                assert relative(other.statistic(kind, name), results[0].statistic(kind, name)) < 1e-12


def test_in_a_mask_with_holes_the_holes_are_left_out():
    model, batch = tiny("llama", torch.float64), batches(1)[0]
    batch["attention_mask"][0, 1] = 0
    batch["labels"][0, 5] = -100
    collect = Collect(model, ("snip", "wanda"))
    collect.add(batch)
    scores = collect.scores()
    name = scores.names[-1]
    gradients = torch.zeros_like(scores.statistic("snip", name))
    for b in range(3):
        logits = model(
            input_ids=batch["input_ids"][b : b + 1], attention_mask=batch["attention_mask"][b : b + 1]
        ).logits
        loss = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][b, 1:])
        gradients += torch.autograd.grad(loss, dict(model.named_parameters())[name])[0].abs()
    assert relative(scores.statistic("snip", name), gradients) < 1e-12
    assert scores.input_tokens == int(((batch["labels"] != -100) & (batch["attention_mask"] != 0)).sum())


def test_a_linear_model_whose_gradients_are_written_by_hand():
    """One layer of ones would do: W x with a target, gradient (softmax(W x) - y) x^T, by hand, two samples."""
    torch.manual_seed(0)
    x, w, y = torch.randn(2, 1, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, 3])
    g = (torch.einsum("btd,od->bto", x, w).softmax(-1) - nn.functional.one_hot(y, 4)[:, None]).to(torch.float64)
    score = torch.zeros(4, 3, dtype=torch.float64)
    abs_weight_grad_(score, g, x)
    by_hand = torch.zeros(4, 3, dtype=torch.float64)
    for b in range(2):
        p = torch.exp(w @ x[b, 0]) / torch.exp(w @ x[b, 0]).sum()
        for o in range(4):
            for i in range(3):
                by_hand[o, i] += abs((float(p[o]) - (1.0 if o == int(y[b]) else 0.0)) * float(x[b, 0, i]))
    torch.testing.assert_close(score, by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize("use", ["checkpointing", "compile", "layers compiled", "own mode"])
def test_what_is_done_to_a_model_does_not_change_its_scores(use):
    model, given = tiny("llama"), batches()
    expected = collected(tiny("llama"), given)
    called = model
    if use == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif use == "compile":
        called = torch.compile(model, backend="eager")
        called(input_ids=given[0]["input_ids"])
    elif use == "layers compiled":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        model.eval()
    scores = collected(called, given)
    for kind in STATISTICS:
        for name in expected.names:
            assert torch.equal(scores.statistic(kind, name), expected.statistic(kind, name))
    assert model.training == (use != "own mode")


def test_checkpointing_keeps_no_inputs():
    """What is saved for the scores is saved where the checkpoint can drop it."""
    model, batch = tiny("llama", num_hidden_layers=6), batches(1, size=8, tokens=48)[0]

    def peak(checkpointing):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            collect = Collect(model)
            collect.add(batch)
            collect.close()
        return sum(held)

    without = peak(False)
    assert peak(True) < 0.5 * without


def test_reentrant_checkpointing_is_refused():
    model = tiny("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="reentrant"):
        Collect(model).add(batches(1)[0])


def test_dropout_is_off_under_checkpointing_and_one_that_cannot_be_is_refused():
    model = tiny("phi", resid_pdrop=0.5, embd_pdrop=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = tiny("phi")
    for a, b in ((collected(model, batches()), collected(plain, batches())),):
        assert relative(a.statistic("snip", a.names[0]), b.statistic("snip", a.names[0])) < 1e-6
    assert all(m.training for m in model.modules())
    refused = tiny("llama", attention_dropout=0.1)
    refused.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        Collect(refused).add(batches(1)[0])


def test_lora_factors_are_scored():
    peft = pytest.importorskip("peft")
    model = tiny("llama", torch.float64)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    scores = collected(wrapped, batches(), modules=lambda name: "lora_" in name)
    assert len(scores.names) == 3 * 2 * 2
    base = wrapped.get_base_model()
    expected: dict[str, torch.Tensor] = {}
    for p in base.parameters():
        p.requires_grad_(True)
    per_sample_gradients(base, batches(), lambda name, g: expected.update({name: expected.get(name, 0) + g.abs()}))
    for name in scores.names:
        assert relative(scores.statistic("snip", name), expected[name]) < 1e-12


@pytest.mark.parametrize(
    ("name", "refused"),
    [("mixtral", "experts"), ("qwen3_moe", "experts"), ("gpt2", "c_attn.weight of a Conv1D")],
)
def test_what_cannot_be_scored_is_refused_by_name(name, refused):
    model = tiny(name)
    with pytest.raises(ValueError, match=refused):
        Collect(model)
    if name != "gpt2":
        scores = collected(model, batches(), modules=lambda name: "self_attn" in name)
        assert len(scores.names) == 3 * 4


def test_bad_input_is_told():
    model = tiny("llama")
    with pytest.raises(ValueError, match="statistics: expected some of snip, fisher"):
        Collect(model, ("snap",))
    with pytest.raises(ValueError, match="tokens: expected one of answer, all"):
        Collect(model, tokens="prompt")
    with pytest.raises(ValueError, match="modules: expected at least one"):
        Collect(model, modules=lambda name: False)
    collect = Collect(model)
    batch = batches(1)[0]
    with pytest.raises(ValueError, match="expected at least one sample"):
        collect.scores()
    with pytest.raises(ValueError, match="no token carries loss"):
        collect.add({**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ValueError, match=r"expected labels \(3, 9\)"):
        collect.add({**batch, "labels": batch["labels"][:2]})
    with pytest.raises(ValueError, match="input_ids"):
        collect.add({"ids": batch["input_ids"]})
    collect.add(batch)
    assert collect.scores().samples == 3
    collect.close()
    with pytest.raises(RuntimeError, match="closed"):
        collect.add(batch)


def test_a_weight_that_is_used_twice_or_not_at_all_is_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(RuntimeError, match=r"up_proj\.weight ran twice"):
        Collect(model).add(batches(1)[0])
    model = tiny("llama")
    model.model.layers[1].mlp.spare = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match=r"spare\.weight did not run"):
        Collect(model).add(batches(1)[0])


def test_a_loss_that_is_not_finite_stops_and_leaves_the_sums():
    model, given = tiny("llama"), batches()
    collect = Collect(model)
    collect.add(given[0])
    before = {key: value.clone() for key, value in collect.state_dict()["sums"].items()}
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="after 3 samples"):
        collect.add(given[1])
    with torch.no_grad():
        weight.copy_(kept)
    assert all(torch.equal(value, before[key]) for key, value in collect.state_dict()["sums"].items())
    collect.add(given[1])
    assert collect.scores().samples == 6


def test_sums_of_half_a_batch_are_not_handed_out():
    model, given = tiny("llama"), batches()
    collect = Collect(model)
    handle = model.model.layers[0].self_attn.register_full_backward_hook(lambda *_: (_ for _ in ()).throw(OSError("x")))
    with pytest.raises(OSError, match="x"):
        collect.add(given[0])
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    for call in (collect.scores, collect.state_dict, lambda: collect.add(given[1])):
        with pytest.raises(RuntimeError, match="half-way"):
            call()


def test_a_resumed_sum_has_the_same_bits(tmp_path):
    model, given = tiny("llama"), batches(4)
    whole = collected(model, given)
    first = Collect(model, STATISTICS)
    first.add(given[0])
    first.add(given[1])
    state = copy.deepcopy(first.state_dict())
    first.close()
    second = Collect(model, STATISTICS)
    second.load_state_dict(state)
    second.add(given[2])
    second.add(given[3])
    scores = second.scores({"model": "tiny"})
    for kind in STATISTICS:
        assert scores.sums[kind].keys() == whole.sums[kind].keys()
        assert all(torch.equal(value, whole.sums[kind][name]) for name, value in scores.sums[kind].items())
    loaded = Scores.load(scores.save(tmp_path))
    assert (loaded.samples, loaded.layers, loaded.inputs) == (12, whole.layers, whole.inputs)
    assert loaded.about == {"model": "tiny"}
    for kind in STATISTICS:
        for name in whole.names:
            assert torch.equal(loaded.statistic(kind, name), whole.statistic(kind, name))
    with pytest.raises(ValueError, match="expected snip of the weights"):
        Collect(model).load_state_dict(state)


def test_one_input_of_three_maps_is_taken_once():
    scores = collected(tiny("llama"), batches())
    assert len(scores.sums["gram"]) == 3 * 4  # attention's, its output's, the MLP's, its output's
    assert scores.inputs["model.layers.1.self_attn.v_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"


def test_statistics_of_inputs_alone_need_no_backward():
    model = tiny("llama")
    collect = Collect(model, ("wanda",))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("something was saved"), lambda t: t):
        collect.add(batches(1)[0])
    assert collect.scores().samples == 3


def test_bf16_sums_are_those_of_float64_where_the_published_ones_drift():
    """Many samples: a sum in the weights' own bf16 stops growing, fp32 does not (a sample's own error averages out)."""
    torch.manual_seed(0)
    g, x = torch.randn(4096, 2, 16), torch.randn(4096, 2, 24)
    g, x = g.bfloat16(), x.bfloat16()
    score, published = torch.zeros(16, 24), torch.zeros(16, 24, dtype=torch.bfloat16)
    for part in range(0, 4096, 64):
        abs_weight_grad_(score, g[part : part + 64], x[part : part + 64])
    for b in range(4096):
        published += (g[b].T @ x[b]).abs()
    exact = torch.einsum("bto,bti->boi", g.double(), x.double()).abs().sum(0)
    assert relative(score, exact) < 1e-3
    assert relative(published, exact) > 0.1

"""ReFATLoss against the algorithm said by hand; that it does something; directions found again under ablation."""

from __future__ import annotations

import copy
import functools
import pickle

import peft
import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from defenses.published_refat import directions_of, forward
from directions.planted import REFUSAL, planted, prompts
from fastguard import ReFATLoss
from fastguard.directions import Stream, estimate
from fastguard.nested.guard import derived_seed
from tiny_models import ARCHITECTURES, VOCABULARY, assert_same_gradients, gradients, tiny


def batch(seed: int, kind: int, size: int = 6, length: int = 10) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the right; the kinds differ in their tokens."""
    g = torch.Generator().manual_seed(10 * seed + kind)
    low, high = ((3, VOCABULARY // 2), (VOCABULARY // 2, VOCABULARY))[kind]
    ids = torch.randint(low, high, (size, length), generator=g)
    prompt = torch.randint(2, 5, (size, 1), generator=g)
    end = torch.randint(7, length + 1, (size, 1), generator=g)
    at = torch.arange(length)
    return {
        "input_ids": torch.where(at < end, ids, 0),
        "attention_mask": (at < end).long(),
        "labels": torch.where((at >= prompt) & (at < end), ids, -100),
    }


def both(seed: int, **shape: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"refusal": batch(seed, 0, **shape), "retain": batch(seed, 1, **shape)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "ulps"), [("gpt2", 4096.0), ("llama", 1e9)])
def test_equals_the_algorithm_said_by_hand(name, ulps, checkpointing, calls):
    """Loss, gradients and directions over six steps of training, estimated every second step.

    A Llama of transformers norms in fp32 whatever its dtype, where it is not fused: a GPT-2 is exact.
    """
    model = tiny(name, torch.float64, num_hidden_layers=4)
    other = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_fn = ReFATLoss(model, every=2, samples=1, retain_weight=0.7, seed=5)
    layers, found, seen = loss_fn.layers, {}, ([], [])
    assert layers == (1, 2, 3)
    steps = [torch.optim.SGD(m.parameters(), 0.05) for m in (model, other)]
    ablated = 0
    for step in range(6):
        batches = both(step)
        loss = loss_fn(**batches)
        loss.backward()  # after the contexts were left, as a trainer does
        if step in (1, 3, 5):  # the first call finds the first directions, then every second
            found, seen = directions_of(*seen, layers), ([], [])
        chosen = torch.zeros(6, dtype=torch.bool)
        if step:
            chosen = draws(loss_fn, step)
            for layer, rows in loss_fn.bases().items():
                assert_agrees(f"direction of layer {layer}", rows[0], found[layer], ulps=ulps)
        ablated += int(chosen.sum())
        ce, states = forward(other, batches["refusal"], found, chosen)
        retain, harmless = forward(other, batches["retain"], {}, chosen)
        expected = ce + 0.7 * retain
        expected.backward()
        seen[0].append(states[:, ~chosen])
        seen[1].append(harmless)
        assert_agrees("loss", loss.detach(), expected.detach(), ulps=ulps)
        ours, theirs = gradients(model), gradients(other)
        assert_same_gradients(ours, theirs, 64 * ulps * 2**-52)
        deep = next(n for n in theirs if "2.mlp" in n and theirs[n].dim() == 2)
        assert_catches_spoiled(
            functools.partial(assert_agrees, deep, reference=theirs[deep], ulps=64 * ulps), ours[deep]
        )
        for optimizer, grads, m in ((steps[0], ours, model), (steps[1], theirs, other)):
            for n, p in m.named_parameters():
                p.grad = grads[n]
            optimizer.step()
            optimizer.zero_grad()
    assert 6 < ablated < 24
    assert len(calls) >= 3 * 5, "the layers that are ablated run their fused form"
    loss_fn.close()


def draws(loss_fn: ReFATLoss, call: int) -> torch.Tensor:
    """The samples of a call, as the constructor's text says: of seed, call and index alone."""
    generator = torch.Generator().manual_seed(derived_seed("refat", loss_fn.seed, call))
    return torch.rand(6, generator=generator, dtype=torch.float64) < loss_fn.p


def test_it_does_something_and_the_last_position_alone_does_not():
    """A public re-implementation ablates the last position of prompt and answer, which no loss can see."""
    model, direction = planted(layers=4)
    loss_fn = ReFATLoss(model, p=0.999, layers=(1, 2, 3))
    loss_fn.estimate(prompts(True, 6), prompts(False, 6))
    for rows in loss_fn.bases().values():
        assert abs(float(rows[0] @ direction)) > 0.95
    harmful = {**prompts(True, 1)[0], "labels": torch.full((8, 9), -100)}
    harmful["labels"][:, 5:] = REFUSAL
    harmless = {**prompts(False, 1)[0]}
    harmless["labels"] = harmless["input_ids"].where(torch.arange(9) > 4, -100)
    loss_fn(refusal=harmful, retain=harmless).backward()
    found = gradients(model)
    assert loss_fn.components["ablated"] == 1
    with torch.no_grad():
        plain, _ = forward(model, harmful, {}, torch.zeros(8, dtype=torch.bool))
    assert loss_fn.components["refusal_ce"] > plain + 0.5, "refusing is harder without the feature"
    ours = found["model.embed_tokens.weight"]
    lost = float((ours @ direction).norm() / ours.norm())
    loss_fn.close()

    last = torch.arange(9) == 8

    def only_last(module, args, kwargs):
        x = args[0]
        return (torch.where(last[:, None], x - (x @ direction)[..., None] * direction, x), *args[1:]), kwargs

    handle = model.model.layers[1].register_forward_pre_hook(only_last, with_kwargs=True)
    with torch.no_grad():
        again, _ = forward(model, harmful, {}, torch.zeros(8, dtype=torch.bool))
    handle.remove()
    assert again == plain
    assert lost < 0.9, "gradients pass through the projection, less what it takes out"


def test_the_next_direction_is_what_the_ablated_samples_still_show():
    model = tiny("gpt2", torch.float64, num_hidden_layers=4)
    loss_fn = ReFATLoss(model, every=1, directions=3, samples=1, seed=2)
    harmful, harmless = batch(0, 0), batch(0, 1)
    for _ in range(2):
        loss_fn(refusal=harmful, retain=harmless)  # the first finds directions, the second ablates
    first = loss_fn.bases()
    assert all(len(rows) == 1 for rows in first.values())
    chosen = draws(loss_fn, 1)
    assert 0 < int(chosen.sum()) < 6
    with torch.no_grad():
        _, states = forward(model, harmful, {i: rows[0] for i, rows in first.items()}, chosen)
        _, plain = forward(model, harmless, {}, chosen)
    loss_fn(refusal=harmful, retain=harmless)
    for layer, rows in loss_fn.bases().items():
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64))
        left = states[layer, chosen].mean(0) - plain[layer].mean(0)
        left = left - (left @ first[layer][0]) * first[layer][0]  # what was known when it was seen
        left = left - (left @ rows[0]) * rows[0]  # and the first, estimated again
        assert len(rows) == 2
        assert_agrees(f"second direction of layer {layer}", rows[1], left / left.norm(), ulps=1e5)
    for _ in range(2):
        loss_fn(refusal=harmful, retain=harmless)
    assert all(len(rows) == 3 for rows in loss_fn.bases().values())
    loss_fn.close()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_with_and_without_the_fused_form(name):
    """What the loss reads equals the model's own logits, projected by hooks alone."""
    model = tiny(name).eval()
    loss_fn = ReFATLoss(model, p=0.9, layers=(1, 2), every=1)
    for step in range(3):
        loss_fn(**both(step))
    bases = {i: rows[None] for i, rows in loss_fn.bases().items()}
    assert set(bases) == {1, 2}
    given, index = batch(2, 0), torch.where(draws(loss_fn, 2), 0, -1)
    loss_fn.close()
    stream = Stream(model)
    with torch.no_grad(), stream.ablated(bases, basis_index=index, fused=False):
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    stream.close()
    target = given["labels"][:, 1:].flatten()
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target, ignore_index=-100)
    torch.testing.assert_close(loss_fn.components["refusal_ce"], ce, rtol=2e-5, atol=0)


def test_lora_trains_its_adapters_alone(calls):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama"), config)
    loss_fn = ReFATLoss(model, every=1)
    for step in range(2):
        loss_fn(**both(step)).backward()
    assert calls and loss_fn.components["ablated"] > 0
    found = gradients(model)
    assert found and all("lora_" in name for name in found)
    assert any(float(g.abs().max()) > 0 for g in found.values())
    loss_fn.close()


def test_bf16(calls):
    model = tiny("llama", torch.bfloat16)
    wide = copy.deepcopy(model).float()
    values = []
    for each in (model, wide):
        loss_fn = ReFATLoss(each, every=1, seed=1)
        for step in range(2):
            loss = loss_fn(**both(step))
        loss.backward()
        values.append(loss.detach())
        assert loss.dtype == torch.float32 and all(torch.isfinite(g).all() for g in gradients(each).values())
        loss_fn.close()
    assert abs(values[0] - values[1]) < 0.02 * values[1]


def test_compiled():
    """The same values and gradients; one graph for the ablated batch and one for the other."""
    torch._dynamo.reset()
    model, other = (tiny("llama", torch.float64, num_hidden_layers=2) for _ in range(2))
    loss_fns = ReFATLoss(model, layers=(1,), seed=3), ReFATLoss(other, layers=(1,), seed=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        batches = both(step)
        losses = loss_fns[0](**batches, model=compiled), loss_fns[1](**batches)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        assert_same_gradients(gradients(model), gradients(other), 1e-7)
    assert loss_fns[1].components["ablated"] > 0
    for loss_fn in loss_fns:
        loss_fn.close()


def test_directions_as_published_from_prompts_of_their_own():
    model, direction = planted(layers=4)
    loss_fn = ReFATLoss(model, every=None)
    harmful, harmless = prompts(True, 6, padding="left"), prompts(False, 6, padding="left")
    loss_fn.estimate(harmful, harmless)
    expected = estimate(model, harmful, harmless, positions=1).difference[0]
    for layer, rows in loss_fn.bases().items():
        assert_agrees("direction", rows[0], expected[layer] / expected[layer].norm())
        assert abs(float(rows[0] @ direction)) > 0.95
    before = loss_fn.bases()
    for step in range(3):
        loss_fn(**both(step))
    assert all(torch.equal(rows, before[i]) for i, rows in loss_fn.bases().items()), "every=None: no other source"
    loss_fn.close()


def test_an_evaluation_moves_nothing():
    model = tiny("llama")
    loss_fn = ReFATLoss(model, every=1)
    for step in range(2):
        loss_fn(**both(step))
    before = {k: v.clone() for k, v in loss_fn.state_dict().items()}
    components = loss_fn.components
    with torch.no_grad():
        loss_fn(**both(7))
    assert loss_fn.components is components and loss_fn.evaluation["loss"] != components["loss"]
    assert all(torch.equal(v, before[k]) for k, v in loss_fn.state_dict().items())
    loss_fn.close()


def test_the_model_is_as_it_was_and_its_copies_are_plain(tmp_path):
    model = tiny("llama").eval()
    kinds = [type(layer) for layer in model.model.layers]
    before = {id(m): dict(vars(m)) for m in model.modules()}
    loss_fn = ReFATLoss(model, every=1)
    for step in range(2):
        loss_fn(**both(step))
    ids = both(0)["retain"]["input_ids"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(layer) for layer in copied.model.layers] == kinds
        with torch.no_grad():
            torch.testing.assert_close(copied(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    loss_fn.close()
    assert [type(layer) for layer in model.model.layers] == kinds
    assert {id(m): dict(vars(m)).keys() for m in model.modules()} == {i: v.keys() for i, v in before.items()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="closed"):
        loss_fn(**both(0))


def test_a_layer_without_a_difference_has_no_direction():
    """The first layer's input at the last prompt token is an embedding, and prompts end with the same token."""
    model = tiny("llama", num_hidden_layers=2)
    loss_fn = ReFATLoss(model, layers=(0, 1), every=1)
    batches = both(0)
    for each in batches.values():
        first = (each["labels"] != -100).int().argmax(1)
        each["input_ids"][torch.arange(6), first - 1] = 5
    for _ in range(2):
        loss_fn(**batches)
    assert set(loss_fn.bases()) == {1}
    loss_fn.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.0}, "p: expected 0 <= p < 1, got 1.0"),
        ({"every": 0}, "every: expected an int >= 1, got 0"),
        ({"layers": (3,)}, r"layers: expected some of 0 to 2, each once, got \(3,\)"),
        ({"layers": (1, 1)}, "layers: expected some of"),
        ({"directions": 32}, "directions: expected at most 31, got 32"),
        ({"samples": True}, "samples: expected an int >= 1, got True"),
        ({"retain_weight": -1}, "retain_weight: expected a finite number >= 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        ReFATLoss(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batches_that_do_not_fit():
    loss_fn = ReFATLoss(tiny("llama"))
    good = both(0)
    without = {k: v for k, v in good["refusal"].items() if k != "labels"}
    with pytest.raises(ValueError, match="refusal: expected labels"):
        loss_fn(refusal=without, retain=good["retain"])
    whole = {**good["retain"], "labels": good["retain"]["input_ids"]}
    with pytest.raises(ValueError, match=r"retain: expected a prompt and an answer in each sample.* sample 0"):
        loss_fn(refusal=good["refusal"], retain=whole)
    with pytest.raises(ValueError, match="refusal: expected a mapping"):
        loss_fn(refusal=[1], retain=good["retain"])
    loss_fn.close()


def test_what_is_not_finite_is_named():
    model = tiny("llama")
    loss_fn = ReFATLoss(model)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="ReFATLoss: refusal_ce is nan"):
        loss_fn(**both(0))
    assert int(loss_fn.call) == 0
    loss_fn.close()

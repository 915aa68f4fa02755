"""SN-Tune and RSN-Tune find the neurons that taking each away in turn finds, and train nothing else."""

import copy

import pytest
import torch

from defenses.published_booster import plain_loss
from defenses.published_sn_tune import least, robust_neurons, safety_neurons, tuned
from fastguard.defenses.rsn_tune.step import RSNTune
from fastguard.defenses.sn_tune.step import SNTune
from fastguard.saliency.neurons import Neurons
from methods.batches import evidence, labelled
from tiny_models import tiny


def model_of(heads=2, **changes):
    return tiny("llama", torch.float64, num_hidden_layers=2, num_key_value_heads=heads, **changes).eval()


def detection(names=("safety", "foundation")):
    roles = RSNTune.roles
    return evidence({name: roles[name] for name in names})


def chosen_of(method):
    """As the oracle has it."""
    found = {}
    for i in range(2):
        up, down = (method.chosen.get(f"model.layers.{i}.mlp.{n}_proj.weight") for n in ("up", "down"))
        value = method.chosen.get(f"model.layers.{i}.self_attn.v_proj.weight")
        assert (up is None) == (down is None) and (up is None or torch.equal(up[1], down[1]))
        assert up is None or (up[0], down[0]) == (0, 1)
        found[f"ffn {i}"] = set() if up is None else set(up[1].tolist())
        found[f"value {i}"] = set() if value is None else set(value[1].tolist())
    return found


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_the_neurons_are_those_that_every_sample_needs(heads):
    model = model_of(heads)
    data = detection()
    safety, foundation = (least(model, data[name]) for name in ("safety", "foundation"))
    threshold = sorted(safety["ffn 0"])[-12]
    method = SNTune(model, threshold=threshold * (1 - 1e-9), most=9)
    method.detect({"safety": data["safety"]})
    found = safety_neurons(safety, threshold * (1 - 1e-9), 9)
    assert chosen_of(method) == found and len(found["ffn 0"]) == 9
    for most in (5, None):
        method = RSNTune(model, threshold=threshold * (1 - 1e-9), most=9, foundation_most=most)
        method.detect(data)
        found = robust_neurons(safety, foundation, threshold * (1 - 1e-9), 9, most)
        assert chosen_of(method) == found and found != safety_neurons(safety, threshold * (1 - 1e-9), 9)


def test_without_shared_values_the_norm_is_what_taking_the_value_away_changes():
    """The whole attention, run again without one row of its value map."""
    model = model_of(heads=4)
    batch = labelled(3, 1)
    outputs = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: outputs.append(out[0][0]))
    row = {k: v[:1] for k, v in batch.items()}
    expected = []
    with torch.no_grad():
        model(**row)
        weight = model.model.layers[0].self_attn.v_proj.weight
        for k in range(len(weight)):
            kept = weight[k].clone()
            weight[k] = 0
            model(**row)
            expected.append(float((outputs[-1] - outputs[0]).norm()))
            weight[k] = kept
    handle.remove()
    assert least(model, [row])["value 0"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["sn", "rsn"])
def test_three_steps_equal_the_published_ones(kind):
    ours = model_of()
    theirs = copy.deepcopy(ours)
    data = detection()
    safety, foundation = (least(theirs, data[name]) for name in ("safety", "foundation"))
    if kind == "sn":
        method, given = SNTune(ours, threshold=0.0, most=7), {"safety": data["safety"]}
        found = safety_neurons(safety, 0.0, 7)
    else:
        method, given = RSNTune(ours, threshold=0.0, most=7, foundation_most=11), data
        found = robust_neurons(safety, foundation, 0.0, 7, 11)
    mine, its = (torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0) for m in (ours, theirs))
    before = copy.deepcopy(ours)
    tuned(theirs, found, its, lambda n: plain_loss(theirs, labelled(n, 1)), 3)
    for n in range(3):
        figures = method.backward(safety=labelled(n, 1), **({"detection": given} if n == 0 else {}))
        mine.step()
        mine.zero_grad()
    assert float(figures["neurons"]) == sum(map(len, found.values()))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11, msg=name)
    moved = {n for n, p in ours.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])}
    assert moved == set(method.chosen)
    for name in moved:
        dim, index = method.chosen[name]
        p, q = dict(ours.named_parameters())[name], dict(before.named_parameters())[name]
        other = [i for i in range(p.shape[dim]) if i not in index.tolist()]
        assert torch.equal(p.index_select(dim, torch.tensor(other)), q.index_select(dim, torch.tensor(other)))


def test_neurons_alone_can_be_given_to_an_optimizer():
    """The same three steps with optimizer state of the neurons alone."""
    ours = model_of()
    theirs, data = copy.deepcopy(ours), detection(("safety",))
    method = SNTune(ours, threshold=0.0, most=7)
    method.detect(data)
    index = {dim: {n: at for n, (d, at) in method.chosen.items() if d == dim} for dim in (0, 1)}
    whole = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    found = safety_neurons(least(theirs, data["safety"]), 0.0, 7)
    tuned(theirs, found, whole, lambda n: plain_loss(theirs, labelled(n, 1)), 3)
    parts = Neurons(ours, rows=index[0], columns=index[1])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-2, weight_decay=0.0)
    for n in range(3):
        plain_loss(ours, labelled(n, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts.close()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11, msg=name)


def test_detection_is_drawn_once_and_goes_with_the_state():
    asked = []

    def stream(name):
        return lambda n: asked.append((name, n)) or labelled(n, 1)

    method = RSNTune(model_of(), threshold=0.0, most=4, foundation_most=4, samples=7)
    data = {name: stream(name) for name in method.roles}
    drawn = method.draw(data)
    assert set(drawn) == {"safety", "detection"}
    assert [len(drawn["detection"][n]) for n in method.found_by] == [3, 3]  # 9 samples of 3 are the first past 7
    method.backward(**drawn)
    asked.clear()
    assert set(method.draw(data)) == {"safety"} and ("safety", 1) in asked
    again = RSNTune(model_of(), threshold=0.0, most=4, foundation_most=4)
    again.load_state_dict(method.state_dict())
    assert chosen_of(again) == chosen_of(method) and again.step == 1
    again.backward(safety=labelled(1, 1))


def test_padding_excites_nothing():
    model = model_of()
    batch = labelled(0, 1)
    padded = {
        "input_ids": torch.cat([torch.full((3, 4), 2), batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(3, 4, dtype=torch.long), batch["attention_mask"]], 1),
    }
    found = []
    for given in (batch, padded):
        method = SNTune(model, threshold=0.0, most=6)
        method.detect({"safety": [given]})
        found.append(chosen_of(method))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2", "granite"])
def test_other_architectures(name):
    method = SNTune(tiny(name), threshold=0.0, most=3)
    assert len(method.places) == 2 * len(method.structure.layers)
    figures = method.backward(safety=labelled(0, 1), detection={"safety": [labelled(1, 1)]})
    assert float(figures["neurons"]) == 3 * len(method.places)


def test_what_does_not_fit_is_named():
    model = model_of()
    data = detection()
    method = SNTune(model, threshold=1e9)
    with pytest.raises(
        ValueError, match=r"threshold: expected one that leaves neurons to tune, got 1e\+09; the highest"
    ):
        method.backward(safety=labelled(0, 1), detection=data)
    assert method.chosen is None and method.step == 0
    with pytest.raises(ValueError, match=r"SNTune\.backward: detection: expected batches safety at the first step"):
        method.backward(safety=labelled(0, 1))
    with pytest.raises(ValueError, match="detection: expected safety, foundation, got safety"):
        RSNTune(model).detect({"safety": data["safety"]})
    with pytest.raises(ValueError, match="detection: safety: expected at least one batch"):
        SNTune(model).detect({"safety": []})
    method = SNTune(model, threshold=0.0)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: expected model\.layers\.0\.mlp\.up_proj\.weight to be trained"):
        method.backward(safety=labelled(0, 1), detection=data)
    with pytest.raises(ValueError, match=r"parts: expected some of ffn, value"):
        SNTune(model, parts=("query",))
    with pytest.raises(ValueError, match=r"without one, parts=\('ffn',\)"):
        SNTune(tiny("gpt_neox"), parts=("value",))
    with pytest.raises(ValueError, match="experts are not supported"):
        SNTune(tiny("mixtral"), parts=("ffn",))

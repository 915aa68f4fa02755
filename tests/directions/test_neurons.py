"""MLP neurons along a direction, against whole activations multiplied out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastguard.directions.neurons import GROUPS, Neurons, neuron_groups, neurons
from fastguard.evaluation.figures import svg
from tiny_models import pair, tiny

WIDTH = 32


def batches() -> list[dict[str, Tensor]]:
    """Prompts of three tokens, padding on the right, answers of several lengths."""
    made = []
    for seed in range(2):
        batch, _ = pair(batch=3 + seed, length=9, seed=seed, padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :3] = -100
        made.append({**batch, "labels": labels})
    return made


def direction(seed: int = 0) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(model: nn.Module, downs: list[nn.Module], weights: list[Tensor], given) -> tuple[Tensor, Tensor]:
    """Means [L, F] over answers, and v.w, from captured activations and weights [D, F]."""
    rows: list[list[Tensor]] = [[] for _ in downs]
    keep: list[Tensor] = []
    hooks = [
        down.register_forward_pre_hook(lambda m, a, i=i: rows[i].append(a[0][keep[-1]])) for i, down in enumerate(downs)
    ]
    with torch.no_grad():
        for batch in given:
            keep.append(batch["labels"] != -100)
            model(**{k: v for k, v in batch.items() if k != "labels"})
    for hook in hooks:
        hook.remove()
    w = direction() / direction().norm()
    return torch.stack([torch.cat(r).mean(0) for r in rows]), torch.stack([w.to(x) @ x for x in weights])


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for p in other.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return other


DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "phi": "model.layers.{}.mlp.fc2",
    "gpt2": "transformer.h.{}.mlp.c_proj",
}


@pytest.mark.parametrize("name", DOWN)
def test_means_and_alignment(name):
    """Also transposed weights (GPT-2) and a norm behind the MLP (Gemma 2); prompts and padding do not count."""
    model = tiny(name, torch.float64).eval()
    found = neurons(model, batches(), direction())
    downs = [model.get_submodule(DOWN[name].format(i)) for i in range(3)]
    weights = [m.weight.detach().T if name == "gpt2" else m.weight.detach() for m in downs]
    mean, alignment = by_hand(model, downs, weights, batches())
    assert found.mean.dtype == torch.float64 and mean.abs().max() > 0.01
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.alignment, alignment, rtol=1e-9, atol=1e-12)
    assert found.tokens == sum(int((b["labels"] != -100).sum()) for b in batches())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in downs)


def test_groups_add_up_to_what_the_mlps_write():
    """Reduction, increase and rewritten weights: the change of the mean of w.MLP(x), read off the MLPs' outputs."""
    before = tiny("llama", torch.float64).eval()
    after = moved(before)
    groups = neuron_groups(*(neurons(model, batches(), direction()) for model in (before, after)))

    def written(model: nn.Module) -> Tensor:
        rows: list[list[Tensor]] = [[] for _ in range(3)]
        for batch in batches():
            keep = batch["labels"] != -100
            hooks = [
                layer.mlp.register_forward_hook(lambda m, a, y, i=i: rows[i].append(y[keep]))
                for i, layer in enumerate(model.model.layers)
            ]
            with torch.no_grad():
                model(**{k: v for k, v in batch.items() if k != "labels"})
            for hook in hooks:
                hook.remove()
        return torch.stack([torch.cat(r).mean(0) for r in rows]) @ (direction() / direction().norm())

    torch.testing.assert_close(groups.total, written(after) - written(before), rtol=1e-9, atol=1e-12)
    assert (groups.reduction <= 0).all() and (groups.increase >= 0).all() and groups.counts.min() > 0
    assert float(groups.shares.sum()) == pytest.approx(1)
    assert groups.counts.sum() == int((groups.shift < 0).sum())


def test_each_group_is_what_it_is_called():
    #                      TP-  TN+   AP+  AN-   and the four that raise the projection, one that stays
    alignment = torch.tensor([[2.0, 2.0, -2.0, -2.0, 2.0, 2.0, -2.0, -2.0, 2.0]])
    mean = torch.tensor([[3.0, -3.0, 3.0, -3.0, 3.0, -3.0, 3.0, -3.0, 3.0]])
    change = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0]])
    found = neuron_groups(Neurons(mean, alignment, 1), Neurons(mean + change, alignment, 1))
    assert found.group.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1, -1]]
    grew = ((mean + change).abs() - mean.abs())[0, :4]
    assert ["+" if g > 0 else "-" for g in grew] == [name[-1] for name in GROUPS]
    assert found.reduction.tolist() == [[-2.0] * 4] and found.increase.tolist() == [8.0]
    assert found.counts.tolist() == [[1] * 4] and found.rewritten.tolist() == [0.0]


def test_adapters_on_and_off():
    from peft import LoraConfig, get_peft_model

    base = tiny("llama", torch.float64).eval()
    plain = neurons(base, batches(), direction())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["down_proj", "q_proj"]), autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    after = neurons(model, batches(), direction())
    with model.disable_adapter():
        before = neurons(model, batches(), direction())
    assert torch.equal(before.mean, plain.mean)
    torch.testing.assert_close(before.alignment, plain.alignment, rtol=1e-12, atol=0)
    merged = neurons(copy.deepcopy(model).merge_and_unload(), batches(), direction())
    torch.testing.assert_close(after.alignment, merged.alignment, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(after.mean, merged.mean, rtol=1e-9, atol=1e-12)
    assert neuron_groups(before, after).rewritten.abs().min() > 0


def test_bfloat16_is_near_and_a_layers_own_direction():
    model = tiny("llama").bfloat16().eval()
    found = neurons(model, batches(), direction())
    exact = neurons(copy.deepcopy(model).double(), batches(), direction())
    assert found.mean.dtype == torch.float32
    for name in ("mean", "alignment"):
        a, b = getattr(found, name).double(), getattr(exact, name)
        assert (a - b).norm() < (2e-2 if name == "mean" else 1e-6) * b.norm()
    rows = torch.stack([direction(i) for i in range(3)])
    each = neurons(model, batches(), rows).alignment
    for i in range(3):
        assert torch.equal(each[i], neurons(model, batches(), rows[i]).alignment[i])


def test_the_picture():
    pytest.importorskip("matplotlib")
    model = tiny("llama", torch.float64).eval()
    groups = neuron_groups(*(neurons(each, batches(), direction()) for each in (model, moved(model))))
    panel = groups.panel()
    assert [list(line.y) for line in panel.lines[:4]] == groups.reduction.T.tolist()
    drawn = svg(panel)
    assert drawn.startswith("<svg role") and "TP-" in drawn and "--series-4" in drawn


def test_what_it_refuses():
    model = tiny("llama").eval()
    for given, message in (
        (direction()[:5], r"direction: expected \[32\] or \[3, 32\], got \(5,\)"),
        (0 * direction(), "direction: expected finite rows other than zero"),
        ("w", "direction: expected .* got str"),
    ):
        with pytest.raises(ValueError, match=message):
            neurons(model, batches(), given)
    none = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in batches()]
    for bad in (none, []):
        with pytest.raises(ValueError, match="batches: expected a token that counts"):
            neurons(model, bad, direction())
    with pytest.raises(ValueError, match="batches: expected input_ids"):
        neurons(model, [{"ids": torch.ones(1, 2)}], direction())
    with pytest.raises(ValueError, match=r"model: layer 0: expected a block .* experts are not supported"):
        neurons(tiny("mixtral").eval(), batches(), direction())
    short = neurons(tiny("llama", num_hidden_layers=2).eval(), batches(), direction())
    with pytest.raises(ValueError, match="after: expected"):
        neuron_groups(neurons(model, batches(), direction()), short)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises((FloatingPointError, ValueError), match="finite"):
        neurons(model, batches(), direction())

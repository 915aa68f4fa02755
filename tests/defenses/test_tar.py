"""TAR against an eager statement of the published algorithm, and what a step must leave alone."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import itertools
import os
import signal
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from defenses.published_tar import cross_entropy, labels_of, negative_entropy, outer_step
from fastguard.defenses.tar.step import TAR, Adversary
from fastguard.nested import AdamW, LoRAAdversary, Reference
from tiny_models import VOCABULARY, tiny

STEPS, EVERY = 4, 2
OUTER = 3
SMALL = dict(steps=STEPS, every=EVERY, lrs=(2e-3, 5e-3), count=2, seed=3)


def batch(corpus: str, number: int, size: int = 3, length: int = 7) -> dict[str, Tensor]:
    """The numbered batch of a corpus: right-padded, prompts without loss; a function of its arguments."""
    g = torch.Generator().manual_seed(1000 * number + sum(map(ord, corpus)))
    ids = torch.randint(1, VOCABULARY, (size, length), generator=g)
    mask = torch.ones_like(ids)
    ids[-1, -2:], mask[-1, -2:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def preferences(number: int) -> dict[str, dict[str, Tensor]]:
    return {"chosen": batch("chosen", number), "rejected": batch("rejected", number, length=8)}


SOURCES = {name: partial(batch, name) for name in ("harmful", "retain", "other")}


def held_out(loss: str, step: int) -> list:
    make = preferences if loss == "dpo" else partial(batch, "held out")
    return [make(10 * step + i) for i in range(2)]


def moved(model: nn.Module, by: float = 0.02) -> nn.Module:
    """The model away from where it was, as after Random Mapping."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=g).to(p))
    return model


@pytest.fixture
def float64_norms(monkeypatch):
    """Llama's norm computes in fp32 whatever it is given, so that a gradient's scale reaches its last bits there."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def outer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def run(tar: TAR, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[dict[str, float]]:
    figures = []
    for step in steps:
        found = tar.backward(
            retain=batch("outer retain", step), tamper=held_out(tar.tamper_loss, step),
            adversaries=tar.adversaries(SOURCES),
        )  # fmt: skip
        figures.append({name: float(value) for name, value in found.items()})
        optimizer.step()
        optimizer.zero_grad()
    return figures


def published(model: nn.Module, frozen: nn.Module, plans: list, loss: str, **changes) -> list[dict[str, float]]:
    optimizer, figures = outer(model), []
    for step, attacks in enumerate(plans):
        options = dict(steps=STEPS, every=EVERY, tamper_loss=loss, **changes)
        figures.append(outer_step(model, frozen, batch("outer retain", step), held_out(loss, step), attacks, **options))
        optimizer.step()
        optimizer.zero_grad()
    return figures


def plans(tar: TAR, steps: int = OUTER) -> list[list[tuple[float, list]]]:
    """What the adversaries of the coming steps will do, drawn ahead on a twin of the counters."""
    state, found = tar.state_dict(), []
    for step in range(steps):
        tar.step = state["step"] + step
        found.append([(a.lr, list(a.batches)) for a in tar.adversaries(SOURCES)])
    tar.load_state_dict(state)
    return found


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def bits(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {name: t.detach().clone() for name, t in tensors.items()}
    return found | {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize(
    "name, loss, checkpointing",
    [
        ("llama", "max_entropy", False),
        ("llama_tied", "max_entropy", True),
        ("llama_tied", "dpo", False),
        ("gpt_neox", "max_entropy", False),  # layer norm with bias, parallel blocks
        ("gpt2", "dpo", True),  # tied, learned positions
    ],
)
def test_three_outer_steps_equal_the_published_algorithm(name, loss, checkpointing, float64_norms):
    model = tiny(name, torch.float64)
    frozen = copy.deepcopy(model).eval()
    reference = Reference(model)
    twin, start = copy.deepcopy(moved(model)), copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tar = TAR(model, tamper_loss=loss, reference=reference, **SMALL)
    ahead = plans(tar)
    assert len({lr for plan in ahead for lr, _ in plan}) == 2
    ours = run(tar, model, outer(model), range(OUTER))
    theirs = published(twin, frozen, ahead, loss)
    assert largest_difference(model, twin) < 1e-8
    assert largest_difference(model, start) > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["tamper"] == pytest.approx(other["tamper"], rel=1e-9)
        assert mine["retain_ce"] + mine["representation_distance"] == pytest.approx(other["retain"], rel=1e-9)
        assert mine["representation_distance"] > 0.1


@pytest.mark.parametrize(
    "loss, change",
    [
        ("max_entropy", dict(schedule=None)),
        ("max_entropy", dict(every=1)),
        ("max_entropy", dict(grad_scale=2.0)),
        ("max_entropy", dict(retain_weight=0.5)),
        ("max_entropy", dict(representations=False)),
        ("max_entropy", dict(weight_decay=0.02)),
        ("dpo", dict(beta=0.2)),
    ],
)
def test_every_setting_reaches_the_gradient(loss, change, float64_norms):
    """The comparison above would notice each setting: alone it changes the published gradient, and ours with it."""
    model = tiny("llama", torch.float64)
    frozen = copy.deepcopy(model).eval()
    reference = Reference(model)
    moved(model)
    ours = {k: v for k, v in change.items() if k != "weight_decay"}
    if "weight_decay" in change:
        ours["optimizer"] = partial(AdamW, weight_decay=change["weight_decay"])
    tar = TAR(model, tamper_loss=loss, reference=reference, **{**SMALL, **ours})
    [plan] = plans(tar, 1)
    arguments = dict(retain=batch("outer retain", 0), tamper=held_out(loss, 0))
    tar.backward(**arguments, adversaries=tar.adversaries(SOURCES))
    found = bits(model)
    gradients = {}
    for which, options in (("changed", change), ("default", {})):
        model.zero_grad()
        options = {"steps": STEPS, "every": EVERY, "tamper_loss": loss, **options}
        outer_step(model, frozen, arguments["retain"], arguments["tamper"], plan, **options)
        gradients[which] = bits(model)
    for which, same in (("changed", True), ("default", False)):
        names = [name for name in found if name.endswith(".grad")]
        error = max(float((found[n] - gradients[which][n]).norm() / gradients[which][n].norm()) for n in names)
        assert (error < 1e-8) is same, (which, error)
        assert same or error > 1e-5


def test_defaults_are_published():
    given = {name: p.default for name, p in inspect.signature(TAR).parameters.items()}
    assert given["steps"] == 64 and given["every"] == 4 and given["count"] == 1
    assert given["lrs"] == (2e-5, 4e-5) and given["switch"] == (6.0, 3.0)
    assert given["kinds"] == (("harmful",), ("retain", "harmful"))
    assert given["schedule"] == 0.0625 and given["grad_scale"] == 4.0 and given["beta"] == 0.1
    assert given["tamper_loss"] == "max_entropy" and given["tamper_positions"] == "all"
    assert given["retain_weight"] == 1.0 and given["representations"] and not given["mask_padding"]
    rule = given["optimizer"](4e-5)
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=4e-5).defaults
    assert dataclasses.asdict(rule) == {
        **{k: theirs[k] for k in ("lr", "betas", "eps", "weight_decay")},
        "state_dtype": None,
    }
    tar = TAR(tiny())
    assert tar.weight(63) == 1 and tar.weight(47) == pytest.approx(0.36787944117144233)
    assert TAR(tiny(), schedule=None).weight(5) == 1 / 64


def test_adversaries_are_a_function_of_seed_and_step():
    model = tiny()
    tar = TAR(model, kinds=(("harmful",), ("other",), ("retain", "harmful")), count=3, seed=1)
    numbers: list[int] = []
    drawn: list[tuple[str, float, list[str]]] = []

    def source(name: str):
        return lambda n: numbers.append(n) or {"corpus": name}

    sources = {name: source(name) for name in SOURCES}

    def plan(one: TAR) -> list[tuple[str, float, list[str]]]:
        return [(a.name, a.lr, [b["corpus"] for b in a.batches]) for a in one.adversaries(sources)]

    for tar.step in range(400):
        drawn += plan(tar)
    assert numbers == list(range(400 * 3 * 64))  # none comes twice, in the order of use
    tar.step = 17
    assert plan(tar) == drawn[17 * 3 : 18 * 3]
    other = TAR(model, kinds=tar.kinds, count=3, seed=2)
    other.load_state_dict({"step": 17, "calls": 51})
    assert plan(other) != drawn[17 * 3 : 18 * 3]

    kinds = collections.Counter(corpora[-1] if len(set(corpora)) == 1 else "switch" for _, _, corpora in drawn)
    assert all(abs(kinds[k] / 1200 - 1 / 3) < 0.06 for k in ("harmful", "other", "switch")), kinds
    lrs = collections.Counter(lr for _, lr, _ in drawn)
    assert lrs.keys() == {2e-5, 4e-5} and all(abs(n / 1200 - 1 / 2) < 0.06 for n in lrs.values()), lrs
    points = torch.tensor(
        [corpora.index("harmful") for _, _, corpora in drawn if set(corpora) == {"retain", "harmful"}]
    ).double()
    assert all(
        corpora == sorted(corpora, reverse=True) for _, _, corpora in drawn if "retain" in corpora
    )  # retain first
    assert abs(points.mean() - (64 * 6 / 9 - 0.5)) < 1.5  # Beta(6, 3), floored; its mean has a standard error of 0.5
    assert abs(points.std() - 64 * (6 * 3 / (81 * 10)) ** 0.5) < 1.5


class Boom(Exception):
    pass


def breaking(kind: str, batches: list):
    """Batches of which the third breaks the attack."""
    yield from batches[:2]
    if kind == "exception":
        raise Boom
    if kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    if kind != "too few":
        yield from batches[2:]


ERRORS = {
    "exception": (Boom, None),
    "interrupt": (KeyboardInterrupt, None),
    "too few": (ValueError, "adversary 'second': expected at least 4, got '2 batches'"),
    "retain": (ValueError, "no token carries loss"),
    "nan": (FloatingPointError, "TAR: retain batch: the loss is nan"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_step_that_fails_leaves_no_trace(kind):
    model = tiny("llama_tied", torch.bfloat16)
    model.register_buffer("touched", torch.zeros(3))
    reference = Reference(model)
    moved(model)
    model(input_ids=batch("x", 0)["input_ids"]).logits.float().square().mean().backward()
    tar = TAR(model, reference=reference, **SMALL)
    forwards = itertools.count(1)
    model.register_forward_hook(lambda m, *_: m.touched.add_(1))
    before, counters, state = bits(model), tar.state_dict(), torch.get_rng_state()
    retain, good = batch("outer retain", 0), [batch("harmful", i) for i in range(STEPS)]
    if kind == "retain":
        retain = {**retain, "labels": torch.full_like(retain["labels"], -100)}

    def spoil(module, args, output):
        if (
            next(forwards) == 2 * (STEPS + STEPS // EVERY) + 2
        ):  # the retain pass: both attacks and the reference are over
            return torch.full_like(output, torch.nan)
        return None

    handle = model.model.embed_tokens.register_forward_hook(spoil) if kind == "nan" else None
    error, message = ERRORS[kind]
    attackers = [Adversary("first", 5e-3, good), Adversary("second", 5e-3, breaking(kind, good))]
    with pytest.raises(error, match=message):
        tar.backward(retain=retain, tamper=batch("held out", 0), adversaries=attackers)
    assert_same_bits(before, bits(model))
    assert tar.state_dict() == counters and torch.equal(torch.get_rng_state(), state)
    assert model.training and all(m.training for m in model.modules())
    if handle is not None:
        handle.remove()

    def again() -> dict[str, Tensor]:
        attackers = [Adversary("first", 5e-3, good), Adversary("second", 5e-3, good)]
        tar.backward(retain=batch("outer retain", 0), tamper=batch("held out", 0), adversaries=attackers)
        return bits(model)

    after = again()
    assert any(not torch.equal(after[n], before[n]) for n in before if n.endswith(".grad"))
    assert all(torch.equal(after[n], before[n]) for n, _ in model.named_parameters())


def test_a_resumed_run_equals_an_unbroken_one():
    """Weights, optimizer and counters are all that a checkpoint needs; dropout follows (seed, step) too."""

    def start() -> tuple[nn.Module, TAR]:
        model = tiny("phi", resid_pdrop=0.3)
        return model, TAR(model, **SMALL)

    model, tar = start()
    optimizer = outer(model)
    figures = run(tar, model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), tar.state_dict()))
    figures += run(tar, model, optimizer, range(2, 4))

    torch.manual_seed(77)
    resumed, again = start()  # on the initial weights, which are the reference
    optimizer = outer(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert run(again, resumed, optimizer, range(2, 4)) == figures[2:]
    assert torch.equal(torch.get_rng_state(), before)
    assert largest_difference(model, resumed) == 0
    assert len({tuple(f.values()) for f in figures}) == 4


def test_dropout_is_new_in_every_step_and_the_same_in_a_repeated_one():
    model = tiny("phi", resid_pdrop=0.3)
    tar = TAR(model, representations=False, **SMALL)
    attackers = [Adversary("x", 1e-3, itertools.repeat(batch("harmful", 0)))]
    found = []
    for step in (0, 1, 0):
        tar.load_state_dict({"step": step, "calls": step})
        figures = tar.backward(retain=batch("r", 0), tamper=batch("t", 0), adversaries=attackers)
        found.append([float(figures[name]) for name in ("retain_ce", "tamper", "attacker_first")])
    assert found[0] == found[2]
    assert all(a != b for a, b in zip(found[0], found[1], strict=True))


@pytest.mark.parametrize("loss", ["max_entropy", "dpo"])
def test_adapters_are_attacked_and_defended_and_switched_off_for_the_reference(loss):
    from peft import LoraConfig, get_peft_model

    frozen = tiny("llama", torch.float64).eval()
    model = get_peft_model(tiny("llama", torch.float64), LoraConfig(r=2, target_modules="all-linear")).train()
    moved(model)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    tar = TAR(model, tamper_loss=loss, **SMALL)
    assert tar.reference_bytes == 0
    ahead = plans(tar)
    run(tar, model, outer(model), range(OUTER))
    published(twin, frozen, ahead, loss)
    assert largest_difference(model, twin) < 1e-8
    assert largest_difference(model, start) > 1e-3
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n for n in trained)


def test_an_attacker_with_adapters_of_its_own():
    """The adapters move and are put back; the defender gets the gradients of its own weights alone."""
    model = tiny("llama", torch.float64)
    adversary = LoRAAdversary(model, rank=2)
    tar = TAR(model, trains=adversary.trains, reads=adversary.reads, **SMALL)
    own = [p for n, p in model.named_parameters() if ".lora_" not in n]
    assert tar.reference_bytes == sum(p.numel() * 8 for p in own)
    before = bits(model)
    arguments = dict(retain=batch("outer retain", 0), tamper=batch("held out", 0))
    attackers = [Adversary("one batch again and again", 5e-2, itertools.repeat(batch("harmful", 0)))]
    figures = tar.backward(**arguments, adversaries=attackers)
    assert figures["attacker_last"] < figures["attacker_first"] - 0.05
    after = bits(model)
    assert_same_bits(before, {n: t for n, t in after.items() if not n.endswith(".grad")})
    for name, p in model.named_parameters():
        assert (p.grad is None) is (".lora_" in name), name

    plain = tiny("llama", torch.float64)
    retained = {}
    for one, options in ((model, dict(trains=adversary.trains, reads=adversary.reads)), (plain, {})):
        one.zero_grad()
        TAR(one, grad_scale=0.0, **options, **SMALL).backward(**arguments, adversaries=attackers)
        names = {n.replace(".base_layer", ""): p.grad for n, p in one.named_parameters() if p.grad is not None}
        retained[one] = names
    assert retained[model].keys() == retained[plain].keys()
    for name, grad in retained[model].items():
        torch.testing.assert_close(grad, retained[plain][name], rtol=1e-9, atol=1e-12)
    name = "model.layers.1.mlp.up_proj.base_layer.weight.grad"
    assert float((after[name] - retained[plain]["model.layers.1.mlp.up_proj.weight"]).norm()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_model_that_starts_as_its_reference_has_no_distance_and_no_gradient_from_it(name, dtype):
    model = tiny(name, dtype)
    gradients = []
    for representations in (True, False):
        tar = TAR(model, representations=representations, **SMALL)
        figures = tar.backward(
            retain=batch("outer retain", 0), tamper=held_out("max_entropy", 0), adversaries=tar.adversaries(SOURCES)
        )
        if representations:
            assert figures["representation_distance"] == 0
        gradients.append({n: g for n, g in bits(model).items() if n.endswith(".grad")})
        model.zero_grad()
        tar.close()
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=4e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_no_second_model_is_resident():
    """Live and initial weights change places in the very memory that they lie in, and back."""
    model = tiny("llama")
    initial = [p.detach().clone() for p in model.parameters()]
    tar = TAR(model, **SMALL)
    moved(model)
    live = [p.detach().clone() for p in model.parameters()]
    waiting = tar.reference._host
    places = [t.data_ptr() for t in (*waiting, *model.parameters())]
    assert tar.reference_bytes == sum(p.numel() * 4 for p in model.parameters())
    seen = []

    def look(module, args, kwargs):
        if torch.is_grad_enabled():
            return
        seen.append(not module.training)
        assert all(map(torch.equal, model.parameters(), initial))
        assert all(map(torch.equal, waiting, live))
        assert [t.data_ptr() for t in (*waiting, *model.parameters())] == places

    model.register_forward_pre_hook(look, with_kwargs=True)
    tar.backward(
        retain=batch("outer retain", 0), tamper=held_out("max_entropy", 0), adversaries=tar.adversaries(SOURCES)
    )
    assert seen == [True]  # one forward of the reference a step, without dropout
    assert all(map(torch.equal, model.parameters(), live)) and all(map(torch.equal, waiting, initial))
    assert [t.data_ptr() for t in (*waiting, *model.parameters())] == places
    assert tar.state_bytes == 4 * 3 * 7 * 32 * 4  # four states of [3, 7, 32] in fp32


def test_scale_and_earlier_gradients():
    model = tiny("llama", torch.float64)
    tar = TAR(model, **SMALL)
    arguments = dict(retain=batch("outer retain", 0), tamper=batch("held out", 0))
    tar.backward(**arguments, adversaries=tar.adversaries(SOURCES))
    once = bits(model)
    tar.load_state_dict({"step": 0, "calls": 0})
    tar.backward(**arguments, adversaries=tar.adversaries(SOURCES), scale=0.25)
    for name, value in bits(model).items():
        if name.endswith(".grad"):
            torch.testing.assert_close(value, 1.25 * once[name], rtol=1e-9, atol=1e-13)


def test_losses_can_be_swapped():
    model = tiny("llama", torch.float64)
    calls = collections.Counter()

    def own(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        calls["loss"] += 1
        return cross_entropy(m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, labels_of(b))

    def entropy(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        calls["tamper"] += 1
        return negative_entropy(m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits)

    found = []
    for options in ({}, dict(loss=own, tamper_loss=entropy), dict(loss=own, states_on="cpu")):
        tar = TAR(model, **options, **SMALL)
        figures = tar.backward(
            retain=batch("outer retain", 0), tamper=batch("held out", 0), adversaries=tar.adversaries(SOURCES)
        )
        found.append((figures, bits(model)))
        model.zero_grad()
        tar.close()
    assert calls == {"loss": 2 * (2 * STEPS + 1), "tamper": 2 * STEPS // EVERY}
    for figures, other in found[1:]:
        assert figures.keys() == found[0][0].keys()
        for name, value in figures.items():
            torch.testing.assert_close(value.double(), found[0][0][name].double(), rtol=1e-6, atol=1e-9)
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-6, atol=1e-9)


def test_masks_leave_padding_out():
    model = tiny("llama", torch.float64)
    reference = Reference(model)
    moved(model)
    retain, tampered = batch("outer retain", 0), batch("held out", 0)
    found = {}
    for name, options in (("masked", dict(mask_padding=True, tamper_positions="labels")), ("published", {})):
        tar = TAR(model, reference=reference, **options, **SMALL)
        for padding in (0, 5):
            spoiled = [{**b, "input_ids": b["input_ids"].clone()} for b in (retain, tampered)]
            for b in spoiled:
                b["input_ids"][b["attention_mask"] == 0] = padding
            figures = tar.backward(
                retain=spoiled[0], tamper=spoiled[1], adversaries=[Adversary("x", 1e-3, itertools.repeat(retain))]
            )
            found[name, padding] = [float(figures[k]) for k in ("tamper", "representation_distance")]
        tar.close()
    assert found["masked", 0] == found["masked", 5]
    for a, b in zip(found["published", 0], found["published", 5], strict=True):
        assert abs(a - b) > 1e-6


def test_bad_input_is_named():
    model = tiny()
    for options, message in (
        (dict(every=5, steps=4), r"every: expected 1 to steps \(4\).*got 5"),
        (dict(lrs=()), "lrs: expected learning rates above 0"),
        (dict(count=0), "count: expected at least one adversary, got 0"),
        (dict(kinds=(("a", "b", "c"),)), "kinds: expected tuples of one corpus or two"),
        (dict(switch=(0.0, 1.0)), "switch: expected two numbers above 0"),
        (dict(tamper_loss="entropy"), "tamper_loss: expected .*max_entropy.*got 'entropy'"),
    ):
        with pytest.raises(ValueError, match=message):
            TAR(model, **options)
    tar = TAR(model, tamper_loss="dpo", **SMALL)
    with pytest.raises(ValueError, match=r"sources: expected also \['retain'\], got \['harmful'\]"):
        tar.adversaries({"harmful": SOURCES["harmful"]})
    attackers = tar.adversaries(SOURCES)
    with pytest.raises(ValueError, match="adversaries: expected at least one"):
        tar.backward(retain=batch("r", 0), tamper=batch("t", 0), adversaries=[])
    with pytest.raises(ValueError, match="tamper: expected one batch, or 2, got 3"):
        tar.backward(retain=batch("r", 0), tamper=[preferences(0)] * 3, adversaries=attackers)
    with pytest.raises(ValueError, match="DPO needs batches under 'chosen' and 'rejected', got"):
        tar.backward(retain=batch("r", 0), tamper=batch("t", 0), adversaries=attackers)
    uneven = {"chosen": batch("c", 0), "rejected": batch("r", 0, size=2)}
    with pytest.raises(ValueError, match="tamper: expected pairs, got '3 chosen, 2 rejected'"):
        tar.backward(retain=batch("r", 0), tamper=uneven, adversaries=attackers)


def test_presets_are_the_released_runs():
    bio, cyber = TAR.preset(tiny(), "bio", steps=8), TAR.preset(tiny(), "cyber")
    assert bio.lrs == (2e-6, 2e-5, 4e-5) and len(bio.kinds) == 3 and bio.steps == 8
    assert cyber.lrs == TAR(tiny()).lrs and cyber.kinds == TAR(tiny()).kinds
    with pytest.raises(ValueError, match="name: expected one of cyber, bio, got 'chem'"):
        TAR.preset(tiny(), "chem")


@pytest.mark.parametrize("sources", [[1, 2], {"harmful": [1], "retain": [2]}])
def test_sources_that_are_no_functions_are_named(sources):
    with pytest.raises(ValueError, match="sources: expected a mapping from the corpora's names to functions"):
        TAR(tiny()).adversaries(sources)

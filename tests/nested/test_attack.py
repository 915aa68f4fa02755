"""SimulatedAttack: gradients against an independent eager loop, and that nothing else is left behind."""

from __future__ import annotations

import copy
import os
import signal
import warnings

import pytest
import torch
from torch import nn

from checks import assert_agrees, assert_catches_spoiled
from fastguard.nested import SGD, AdamW, LoRAAdversary, PerturbationLostError, SimulatedAttack
from tiny_models import gradients, pair, tiny

STEPS = 5


def loss(model: nn.Module, seed: int) -> torch.Tensor:
    ids = pair(seed=seed)[0]["input_ids"]
    return model(input_ids=ids, labels=ids).loss


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() for name, t in tensors.items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def eager(model: nn.Module, make, steps: int, every: int, weight) -> dict[str, torch.Tensor]:
    """The sum of weighted gradients at the tampered weights of a copy, by torch's own optimizer."""
    twin = copy.deepcopy(model)
    optimizer = make([p for p in twin.parameters() if p.requires_grad])
    total: dict[str, torch.Tensor] = {}
    for i in range(steps):
        optimizer.zero_grad()
        loss(twin, i).backward()
        optimizer.step()
        if (i + 1) % every == 0:
            optimizer.zero_grad()
            loss(twin, 100).backward()
            for name, p in twin.named_parameters():
                if p.grad is not None:
                    total[name] = total.get(name, 0) + weight(i) * p.grad
    return total


def simulate(attack: SimulatedAttack, model: nn.Module, steps: int, every: int, weight) -> None:
    with attack.at(model) as tampered:
        for i in range(steps):
            tampered.step(loss(model, i))
            if (i + 1) % every == 0:
                tampered.accumulate(loss(model, 100), weight=weight(i))
        assert tampered.steps == steps


def weigh(i: int) -> float:
    return 0.5 + i


OPTIMIZERS = {
    "adamw": (AdamW(lr=1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
    "sgd": (SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe"])
def test_equals_an_eager_loop(name, optimizer, checkpointing):
    if checkpointing and (name == "qwen3_moe" or optimizer == "sgd"):
        pytest.skip("one model, one optimizer")
    model = tiny(name, torch.float64)
    ours, theirs = OPTIMIZERS[optimizer]
    expected = eager(model, theirs, STEPS, 2, weigh)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = bits(model)
    simulate(SimulatedAttack(model, ours), model, STEPS, 2, weigh)
    assert_untouched(model, before)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_agrees(key, found[key], value, ulps=1e5)  # a few Adam steps amplify the last bits
    key = max(expected, key=lambda k: expected[k].numel())
    assert_catches_spoiled(lambda x: assert_agrees(key, x, expected[key], ulps=1e5), found[key])


def test_adds_to_earlier_gradients_and_does_so_for_every_adversary():
    model = tiny("llama", torch.float64)
    attack = SimulatedAttack(model, SGD(0.1))
    loss(model, 7).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for make in (OPTIMIZERS["adamw"], OPTIMIZERS["sgd"]):
        inner = eager(model, make[1], 2, 1, weigh)
        expected = {name: g + inner[name] for name, g in expected.items()}
    for make in (OPTIMIZERS["adamw"], OPTIMIZERS["sgd"]):
        with attack.at(model, optimizer=make[0]) as tampered:
            for i in range(2):
                tampered.step(loss(model, i))
                tampered.accumulate(loss(model, 100), weight=weigh(i))
    for name, value in gradients(model).items():
        assert_agrees(name, value, expected[name], ulps=1e5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_restored_bit_for_bit(dtype):
    model = tiny("llama_tied", dtype)
    before = bits(model)
    moved = []
    with SimulatedAttack(model, AdamW(lr=0.1)).at() as tampered:
        tampered.step(loss(model, 0).float())
        moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters()]
        tampered.accumulate(loss(model, 1).float())
    assert all(moved)
    assert_untouched(model, before)
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


class Boom(Exception):
    pass


def raising(kind: str, model: nn.Module) -> None:
    if kind == "exception":
        raise Boom
    if kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    if kind == "exit":
        raise SystemExit(3)
    if kind == "nan":
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)


ERRORS = {"exception": Boom, "interrupt": KeyboardInterrupt, "exit": SystemExit, "nan": FloatingPointError}


@pytest.mark.parametrize("kind", ERRORS)
def test_whatever_is_raised_the_model_is_as_it_was(kind):
    model = tiny("llama", torch.bfloat16)
    loss(model, 3).backward()
    before, earlier = bits(model), {n: p.grad.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    attack = SimulatedAttack(model, AdamW(lr=0.1))
    with pytest.raises(ERRORS[kind]), attack.at(model) as tampered:
        tampered.step(loss(model, 0))
        tampered.accumulate(loss(model, 1))
        raising(kind, model)
        tampered.step(loss(model, 2))
        tampered.accumulate(loss(model, 1))
    assert_untouched(model, before)
    assert all(torch.equal(p.grad, earlier[n]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_waits_for_the_restoration(monkeypatch):
    from fastguard.nested import snapshot

    model = tiny("llama")
    before = bits(model)
    restore = snapshot.Snapshot.restore_

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
        restore(self)

    monkeypatch.setattr(snapshot.Snapshot, "restore_", interrupted)
    with pytest.raises(KeyboardInterrupt), SimulatedAttack(model, AdamW(lr=0.1)).at(model) as tampered:
        tampered.step(loss(model, 0))
    assert_untouched(model, before)


def test_a_loss_that_is_not_finite_is_named():
    model = tiny("llama")
    with (
        pytest.raises(FloatingPointError, match="attacker's loss at step 1 is nan"),
        SimulatedAttack(model).at(model) as tampered,
    ):
        tampered.step(loss(model, 0))
        tampered.step(loss(model, 0) * torch.nan)
    with (
        pytest.raises(FloatingPointError, match=r"defender's loss after 0 steps .* is inf"),
        SimulatedAttack(model).at(model) as tampered,
    ):
        tampered.accumulate(loss(model, 0) * torch.inf)


def test_random_numbers_belong_to_the_attack_and_survive_a_resumption():
    model = tiny("phi", resid_pdrop=0.3)

    def run(attack: SimulatedAttack) -> torch.Tensor:
        simulate(attack, model, 2, 1, weigh)
        return next(iter(gradients(model).values()))

    attack = SimulatedAttack(model, SGD(0.1), seed=5)
    torch.manual_seed(0)
    first, second, after = run(attack), run(attack), torch.rand(3)
    assert not torch.equal(first, second)  # another call, other dropout
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)  # the attacks drew nothing from the outer stream
    resumed = SimulatedAttack(model, SGD(0.1), seed=5)
    resumed.load_state_dict({"calls": 1})
    assert torch.equal(run(resumed), second)


@pytest.mark.parametrize("where, location", [("device", "device"), ("host", "host"), (0, "host"), (1 << 30, "device")])
def test_where_the_snapshot_waits(where, location):
    model = tiny("llama")
    before = bits(model)
    attack = SimulatedAttack(model, AdamW(lr=0.1), snapshot=where)
    for _ in range(2):
        with attack.at(model) as tampered:
            tampered.step(loss(model, 0))
        assert_untouched(model, before)
    assert attack._snapshot([p.detach() for p in model.parameters()]).location == location


def bf16_and_fp32(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The same weights in both."""
    model = tiny("llama", torch.bfloat16, seed=seed)
    return model, copy.deepcopy(model).float()


def last_loss(model: nn.Module, steps: int, lr: float, **options) -> float:
    with SimulatedAttack(model, AdamW(lr=lr), **options).at() as tampered:
        for _ in range(steps):
            tampered.step(loss(model, 0).float())
        with torch.no_grad():
            return float(loss(model, 0))


def test_an_attacker_that_bf16_rounds_away_is_refused_and_nothing_is_left_behind():
    model, _ = bf16_and_fp32()
    loss(model, 3).backward()
    before, earlier = bits(model), {n: p.grad.clone() for n, p in model.named_parameters()}
    with (
        pytest.raises(PerturbationLostError, match=r"AdamW\(lr=2e-05.*after 1 steps.*masters='fp32'.*allow_lost=True"),
        SimulatedAttack(model, AdamW(lr=2e-5)).at() as tampered,
    ):
        tampered.step(loss(model, 0))
        tampered.accumulate(loss(model, 1))  # where the host waits
        raise AssertionError("went on")
    assert_untouched(model, before)
    assert all(torch.equal(p.grad, earlier[n]) for n, p in model.named_parameters())
    with pytest.raises(PerturbationLostError, match="after 2 steps"), SimulatedAttack(model).at() as tampered:
        for i in range(2):
            tampered.step(loss(model, i))
    attack = SimulatedAttack(model, AdamW(lr=2e-5), allow_lost=True)
    with pytest.warns(RuntimeWarning, match="part of the step was rounded away") as warned:
        for _ in range(2):
            with attack.at() as tampered:
                tampered.step(loss(model, 0))
    assert len(warned) == 1  # not in every step of a training run
    assert tampered.realised.cosine < 0.7
    with SimulatedAttack(model, SGD(lr=0.0)).at() as tampered:  # nothing was meant, nothing is lost
        tampered.step(loss(model, 0))


@pytest.mark.parametrize("lr", [3e-5, 3e-3])
def test_what_is_kept_of_an_attack_is_measured(lr):
    """Against two steps by torch's optimizer on fp32 copies, on the gradients that the attacker got."""
    model, twin = bf16_and_fp32()
    before = bits(model)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=lr, weight_decay=0.01)
    with SimulatedAttack(model, AdamW(lr=lr), allow_lost=True).at() as tampered, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(2):
            for p, g in zip(twin.parameters(), torch.autograd.grad(loss(model, i), [*model.parameters()]), strict=True):
                p.grad = g.float()
            optimizer.step()
            tampered.step(loss(model, i))
        tampered.check()
        start = torch.cat([before[name].double().flatten() for name, _ in model.named_parameters()])
        meant = torch.cat([p.detach().double().flatten() for p in twin.parameters()]) - start
        done = torch.cat([p.detach().double().flatten() for p in model.parameters()]) - start
    found = tampered.realised
    assert abs(found.cosine - meant @ done / meant.norm() / done.norm()) < 1e-4
    assert abs(found.ratio - done.norm() / meant.norm()) < 1e-4
    assert (found.cosine > 0.95) == (lr > 1e-3)


def test_a_sample_is_enough_and_the_first_steps_are(monkeypatch):
    from fastguard.nested import narrow

    model, _ = bf16_and_fp32()

    def measure() -> list[float | None]:
        found = []
        with SimulatedAttack(model, AdamW(lr=1e-3), allow_lost=True).at() as tampered:
            for i in range(4):
                tampered.step(loss(model, i))
                tampered.check()
                found.append(tampered.realised.cosine)
                tampered.realised = None if i == 3 else tampered.realised
        return found

    whole = measure()
    monkeypatch.setattr(narrow, "SAMPLE", 3000)
    some = measure()
    assert some != whole
    assert all(abs(a - b) < 0.05 for a, b in zip(some, whole, strict=True))
    monkeypatch.setattr(narrow, "FOLLOWED", 2)
    first = measure()
    assert first[:2] == some[:2] and first[1] == first[2] != some[2]


def test_weights_in_fp32_are_not_looked_at(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr("fastguard.nested.narrow.Sampled.__init__", never)
    monkeypatch.setattr("fastguard.nested.narrow.Mastered.__init__", never)
    model = tiny("llama")
    for masters in (None, "fp32"):
        with SimulatedAttack(model, AdamW(lr=1e-9), masters=masters).at() as tampered:
            tampered.step(loss(model, 0))


def test_an_optimizer_that_cannot_be_sampled_is_named():
    class Normalised:
        def start(self, tensors):
            class Running:
                def step(self, gradients):
                    for t, g in zip(tensors, gradients, strict=True):
                        t.sub_(g / g.norm())

            return Running()

    model, _ = bf16_and_fp32()
    with (
        pytest.warns(RuntimeWarning, match="Normalised.* is not known to be elementwise"),
        SimulatedAttack(model, Normalised()).at() as tampered,
    ):
        tampered.step(loss(model, 0))


def test_an_attacker_with_masters_is_as_strong_as_in_fp32():
    model, wide = bf16_and_fp32()
    before = bits(model)
    with torch.no_grad():
        start = float(loss(wide, 0))
    exact = start - last_loss(wide, 10, 1e-4)
    lost = start - last_loss(model, 10, 1e-4, allow_lost=True)
    kept = start - last_loss(model, 10, 1e-4, masters="fp32")
    assert exact > 0.1
    assert lost < 0.5 * exact
    assert abs(kept / exact - 1) < 0.15, (exact, lost, kept)
    assert_untouched(model, before)


def test_an_attacker_starts_from_the_masters_of_the_snapshot():
    model, twin = bf16_and_fp32()
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1e-4 * p.abs() * torch.rand(p.shape))
    masters = [p.detach().clone() for p in twin.parameters()]
    with torch.no_grad():
        for p, m in zip(model.parameters(), masters, strict=True):
            p.copy_(m)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, weight_decay=0.01)
    attack = SimulatedAttack(model, AdamW(lr=1e-4), masters="fp32", snapshot=masters)
    before = bits(model)
    with attack.at() as tampered:
        for i in range(3):
            for p, g in zip(twin.parameters(), torch.autograd.grad(loss(model, i), [*model.parameters()]), strict=True):
                p.grad = g.float()
            optimizer.step()
            tampered.step(loss(model, i))
            for p, m in zip(model.parameters(), twin.parameters(), strict=True):
                off = (p != m.bfloat16()).float().mean()  # the last bit of fp32 decides a rounding now and then
                assert off < 2e-3
    assert_untouched(model, before)
    assert all(torch.equal(m.bfloat16(), p) for p, m in zip(model.parameters(), masters, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drawn_masters_round_to_the_weights_and_are_spread_evenly(dtype):
    from fastguard.nested.narrow import dithered

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    assert torch.equal(dithered(every, 0).to(dtype).view(torch.int16), every.view(torch.int16))
    assert torch.equal(dithered(every, 0), dithered(every, 0)) and not torch.equal(
        dithered(every, 0), dithered(every, 1)
    )
    one = dithered(torch.full((100_000,), 1.0, dtype=dtype), 3)  # numbers below 1 lie twice as near
    above = torch.finfo(dtype).eps
    assert one.min() > 1 - above / 4 and one.max() < 1 + above / 2
    assert abs(float(((one + 0.3 * above).to(dtype) - 1).double().mean()) / above - 0.3) < 0.1


def test_masters_need_no_snapshot():
    model = tiny("llama", torch.bfloat16)
    masters = [p.detach().float() + 1e-4 * p.detach().float().abs() * torch.rand(p.shape) for p in model.parameters()]
    with torch.no_grad():
        for p, m in zip(model.parameters(), masters, strict=True):
            p.copy_(m)
    before = bits(model)
    attack = SimulatedAttack(model, AdamW(lr=0.1), snapshot=masters)
    with attack.at(model) as tampered:
        tampered.step(loss(model, 0))
    assert_untouched(model, before)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match=r"parameter 0 is not its master rounded to torch\.bfloat16"), attack.at(model):
        pass


def test_an_attacker_with_adapters_moves_them_alone():
    model = tiny("llama", torch.float64)
    adversary = LoRAAdversary(model, rank=2)
    before = bits(model)
    attack = SimulatedAttack(model, AdamW(lr=0.1), trains=adversary.trains, reads=adversary.reads)
    twin = copy.deepcopy(model)
    lora = [p for n, p in twin.named_parameters() if ".lora_" in n]
    assert len(lora) == 2 * 7 * 3
    optimizer = torch.optim.AdamW(lora, lr=0.1, weight_decay=0.01)
    for i in range(3):
        twin.zero_grad()
        loss(twin, i).backward()
        optimizer.step()
    twin.zero_grad()
    loss(twin, 100).backward()
    with attack.at(model) as tampered:
        for i in range(3):
            tampered.step(loss(model, i))
        assert all(p.grad is None for p in model.parameters())
        tampered.accumulate(loss(model, 100))
    assert_untouched(model, before)
    expected = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if ".lora_" in name:
            assert p.grad is None
        else:
            assert_agrees(name, p.grad, expected[name].grad, ulps=1e5)
    plain = tiny("llama", torch.float64)
    adversary.remove()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(loss(model, 0), loss(plain, 0))


def test_a_peft_model_whose_adapters_the_defender_trains():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama", torch.float64), LoraConfig(r=2, target_modules="all-linear"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    before = bits(model)
    simulate(SimulatedAttack(model, AdamW(lr=0.1)), model, 2, 1, weigh)
    assert_untouched(model, before)
    assert sorted(gradients(model)) == sorted(trained)
    adversary = LoRAAdversary(model, rank=2)
    with SimulatedAttack(model, AdamW(lr=0.1), trains=adversary.trains, reads=adversary.reads).at() as tampered:
        tampered.step(loss(model, 0))
        tampered.accumulate(loss(model, 1))
    assert sorted(gradients(model)) == sorted(trained)


def test_buffers_that_a_forward_changes_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self):
            self.seen += 1
            return self.w.square().sum()

    model = Counting()
    with SimulatedAttack(model, SGD(0.1)).at() as tampered:
        tampered.step(model())
        assert model.seen == 1
    assert model.seen == 0


def test_bad_input_is_named():
    model = tiny("llama")
    with (
        pytest.raises(ValueError, match="snapshot: expected device, host"),
        SimulatedAttack(model, snapshot="gpu").at(),
    ):
        pass
    with pytest.raises(ValueError, match=r"trains: it selects none of the model's \d+ parameters"):
        SimulatedAttack(model, trains=lambda n, p: False).at().__enter__()
    with pytest.raises(ValueError, match=r"reads: 1 of 1 parameters are not the model's"):
        SimulatedAttack(model, reads=[nn.Parameter(torch.ones(1))]).at().__enter__()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for chosen in (None, lambda n, p: False):
        with pytest.raises(ValueError, match=r"model: none of its 2 parameters requires a gradient; expected at least"):
            SimulatedAttack(frozen, trains=chosen).at().__enter__()
    with SimulatedAttack(model).at() as tampered:
        with pytest.raises(ValueError, match=r"expected a 0-dim tensor, got shape \(2,\)"):
            tampered.step(torch.ones(2, requires_grad=True))
        with pytest.raises(ValueError, match="does not depend on any parameter"):
            tampered.step(torch.ones(()))
    with pytest.raises(ValueError, match="masters: expected 'fp32' or None, got 'fp16'"):
        SimulatedAttack(model, masters="fp16")
    with pytest.raises(ValueError, match=r"lr: expected a number >= 0, got -1"):
        AdamW(lr=-1)


@pytest.mark.parametrize(
    "given, got",
    [
        (torch.optim.AdamW, r"the class torch\.optim\.adamw\.AdamW"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), r"a torch\.optim\.sgd\.SGD"),
        (AdamW, r"the class fastguard\.nested\.optimizers\.AdamW"),
        (2e-5, r"a builtins\.float"),
    ],
)
def test_an_optimizer_that_is_no_rule_is_named(given, got):
    expected = (
        rf"optimizer: expected a rule with start\(tensors\), such as fastguard\.nested\.AdamW\(lr=2e-5\).*got {got}"
    )
    model = tiny("llama")
    with pytest.raises(TypeError, match=expected):
        SimulatedAttack(model, given)
    with pytest.raises(TypeError, match=expected):
        SimulatedAttack(model).at(optimizer=given).__enter__()


def test_losses_given_as_functions_ask_for_the_wanted_gradients_alone():
    model = tiny("llama", torch.float64, num_hidden_layers=2)
    adversary = LoRAAdversary(model, rank=2)
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    asked: list[set[str]] = []

    def asks(seed: int) -> torch.Tensor:
        asked.append({name for name, p in model.named_parameters() if p.requires_grad})
        return loss(model, seed)

    def run(lazily: bool) -> dict[str, torch.Tensor]:
        attack = SimulatedAttack(model, AdamW(lr=1e-2), trains=adversary.trains, reads=adversary.reads)
        with attack.at() as tampered:
            for i in range(3):
                value = tampered.step((lambda i=i: asks(i)) if lazily else loss(model, i))
                passes = [(lambda: asks(100), 0.25), (lambda: asks(101), 0.75)]
                whole = 0.25 * loss(model, 100) + 0.75 * loss(model, 101)
                read = tampered.accumulate(passes if lazily else whole, weight=weigh(i))
                assert not value.requires_grad and float(read) == pytest.approx(float(whole), rel=1e-12)
        return gradients(model)

    expected, found = run(False), run(True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-15)
    attacker = {name for name in asking if ".adversary." in name}
    assert asked == [attacker, asking - attacker, asking - attacker] * 3
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), SimulatedAttack(model, trains=adversary.trains).at() as tampered:
        tampered.step(interrupted)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == asking
    assert_untouched(model, before)


def interrupted() -> torch.Tensor:
    raise KeyboardInterrupt


def test_misuse_is_named():
    model = tiny("llama")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got AdamW"):
        SimulatedAttack(AdamW())
    attack = SimulatedAttack(model)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got AdamW"):
        attack.at(AdamW()).__enter__()
    with attack.at() as tampered:
        with pytest.raises(TypeError, match="loss: expected a 0-dim tensor, got float"):
            tampered.step(1.0)
        with pytest.raises(TypeError, match="loss: expected a 0-dim tensor, got NoneType"):
            tampered.step(lambda: None)
        with pytest.raises(ValueError, match="loss: expected at least one pass, got none"):
            tampered.step([])
        with pytest.raises(ValueError, match="weight: expected a finite number, got nan"):
            tampered.accumulate(loss(model, 0), weight=float("nan"))
    before = bits(model)
    for late in (tampered.step, tampered.accumulate):
        with pytest.raises(RuntimeError, match="it is over; step and accumulate belong inside"):
            late(loss(model, 0))
    assert_untouched(model, before)


def test_the_model_is_walked_once_an_attack(monkeypatch):
    from fastguard import fsdp2
    from fastguard.nested import Weights, perturbed

    walks, walk = [], fsdp2.groups_of
    monkeypatch.setattr(fsdp2, "groups_of", lambda modules: walks.append(1) or walk(modules))
    model = tiny("llama")
    with SimulatedAttack(model).at() as tampered:
        tampered.step(loss(model, 0))
        tampered.accumulate(loss(model, 1))
    assert len(walks) == 1
    weights = Weights(model)
    along: list[torch.Tensor | None] = [torch.ones_like(p) for p in model.parameters()]
    along[0] = None
    with perturbed(weights, along, 1.0):
        pass
    assert len(walks) == 2
    some = weights.subset([2, 1])
    assert some.names == [weights.names[2], weights.names[1]] and len(weights) > len(some) == 2
    assert weights.among([model.lm_head.weight]).names == ["lm_head.weight"]

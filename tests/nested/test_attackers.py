"""Several LoRA attackers in one forward, against each of them alone, in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastguard import LanguageModelLoss
from fastguard.losses.pieces import joined
from fastguard.nested import AdamW, LoRAAttackers, SimulatedAttack
from fastguard.nested.attackers import _linears
from tiny_models import VOCABULARY, gradients, tiny

RANKS, ALPHAS, RATES = (2, 4, 1), (16.0, 4.0, 2.0), (3e-2, 1e-2, 1e-3)
STEPS = 3


@pytest.fixture
def float64_norms(monkeypatch):
    """Llama's norm computes in fp32 whatever it is given, so that a last bit of a sum may become one of fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def model_of(kind: str = "plain") -> nn.Module:
    model = tiny("llama", torch.float64, num_hidden_layers=2)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind != "peft":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def batch(seed: int, length: int = 6) -> dict[str, Tensor]:
    """Other numbers of tokens that carry loss in each; lengths differ."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (2, length + seed % 3), generator=g)
    labels = ids.clone()
    labels[:, : 1 + seed % 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batches(step: int) -> list[dict[str, Tensor]]:
    return [batch(10 * step + i) for i in range(len(RANKS))]


class Alone:
    """One attacker of them, whose adapters torch computes as a term of their own, on a copy of the model."""

    def __init__(self, model: nn.Module, attackers: LoRAAttackers, number: int) -> None:
        self.model = copy.deepcopy(model)
        begins = f"attacker {number}: "
        own = {n.removeprefix(begins): p for n, p in attackers.parameters.items() if n.startswith(begins)}
        self.parameters = {n: nn.Parameter(p.detach().clone()) for n, p in own.items()}
        for name, module in _linears(self.model, "all-linear").items():
            module._forward_hooks.clear()  # the copies of those that are tested
            a, b = self.parameters[f"{name}.A"], self.parameters[f"{name}.B"]
            scale = ALPHAS[number] / RANKS[number]
            module.register_forward_hook(lambda m, x, out, a=a, b=b, scale=scale: out + x[0] @ a @ b.T * scale)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=RATES[number], weight_decay=0.01)

    def step(self, data: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        logits = self.model(input_ids=data["input_ids"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        found = {name: p.grad.clone() for name, p in self.parameters.items()}
        self.optimizer.step()
        return float(loss.detach()), found

    def read(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """The base's gradient of minus the mean entropy."""
        self.model.zero_grad()
        logp = self.model(**{k: v for k, v in data.items() if k != "labels"}).logits.log_softmax(-1)
        (logp.exp() * logp).sum(-1).mean().backward()
        return gradients(self.model)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "peft"])
def test_attackers_in_one_forward_are_each_alone_and_the_read_is_the_mean_of_theirs(kind, float64_norms):
    model = model_of(kind)
    with torch.no_grad():
        before, weights = model(**batch(0)).logits, {n: p.clone() for n, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    attackers = LoRAAttackers(model, len(RANKS), RANKS, ALPHAS, seed=1)
    alone = [Alone(model, attackers, i) for i in range(len(RANKS))]
    loss = LanguageModelLoss(model, filter_tol=0.0)
    seen: list[list[Tensor | None]] = []
    rule = attackers.optimizer([Noting(lr, seen) for lr in RATES])
    attack = SimulatedAttack(model, rule, trains=attackers.trains, reads=attackers.reads, beside=attackers.parameters)
    with attackers.at_work(), attack.at() as tampered:
        for i in range(STEPS):
            seen.clear()
            each: list[Tensor] = []

            def together(i=i, each=each) -> Tensor:
                each.append(loss.each(joined(batches(i)), len(RANKS)))
                return each[0].sum()

            tampered.step(together)
            for n, attacker in enumerate(alone):
                value, found = attacker.step(batches(i)[n])
                assert float(each[0][n].detach()) == pytest.approx(value, rel=1e-12)
                assert_near(dict(zip(found, seen[n], strict=True)), found)
        held_out = joined([batch(99)] * len(RANKS))
        tampered.accumulate(lambda: loss.each(held_out, len(RANKS), "max_entropy").mean(), 0.5)
        for n, attacker in enumerate(alone):
            own = [p for name, p in attackers.parameters.items() if name.startswith(f"attacker {n}: ")]
            assert_near(dict(enumerate(own)), dict(enumerate(attacker.parameters.values())))
    reads = [attacker.read(batch(99)) for attacker in alone]
    expected = {name: 0.5 * sum(read[name] for read in reads) / len(RANKS) for name in reads[0]}
    found = gradients(model)
    assert_near(found, expected)
    with pytest.raises(AssertionError):
        assert_near(found, {name: 0.5 * value for name, value in reads[0].items()})
    assert not any(p.any() for name, p in attackers.parameters.items() if name.endswith(".B"))
    with torch.no_grad():
        assert torch.equal(model(**batch(0)).logits, before)  # bit for bit, and with two rows for three attackers
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    loss.close()
    attackers.remove()
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


class Noting(AdamW):
    """Keeps the gradients that it is given."""

    def __init__(self, lr: float, seen: list) -> None:
        super().__init__(lr=lr)
        object.__setattr__(self, "seen", seen)

    def start(self, tensors):
        running, seen = super().start(tensors), self.seen
        step = running.step
        running.step = lambda given: (seen.append([g.clone() for g in given]), step(given))
        return running


def test_a_model_that_was_compiled_before_works_without_a_break_and_bf16_weights_have_attackers_in_fp32():
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    attackers = LoRAAttackers(plain, 2, rank=2)
    assert {p.dtype for p in attackers.parameters.values()} == {torch.float32}
    model = torch.compile(plain, fullgraph=True, backend="eager")
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16)
    before = plain(x)
    for p in attackers.parameters.values():
        nn.init.normal_(p)
    with attackers.at_work():
        found, expected = model(x), plain(x)
    torch.testing.assert_close(found, expected)
    assert float((found - before).detach().norm()) > 0.1 and torch.equal(model(x), before)
    found.sum().backward()
    assert all(float(p.grad.norm()) > 0 for p in attackers.parameters.values())


def test_bad_input_is_named():
    model = tiny("llama", num_hidden_layers=2)
    for options, message in (
        (dict(count=0), "count: expected at least one attacker, got 0"),
        (dict(count=2, rank=(1, 2, 3)), r"rank: expected .* one for each of 2 attackers, got \(1, 2, 3\)"),
        (dict(count=2, alpha=-1), "alpha: expected a number above 0"),
        (dict(count=2, target_modules=["proj"]), r"target_modules: expected 'all-linear' or names .*got \['proj'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAAttackers(model, **options)
    with torch.device("meta"), pytest.raises(ValueError, match=r"expected weights .* on a device, got .*on meta"):
        LoRAAttackers(nn.Sequential(nn.Linear(2, 2)), 1)
    attackers = LoRAAttackers(model, 2, target_modules=["q_proj", "mlp.up_proj"])
    assert len(attackers.parameters) == 2 * 2 * 2 * 2
    with pytest.raises(ValueError, match="rules: expected one for each of 2 attackers, got 1"):
        attackers.optimizer([AdamW()])
    with pytest.raises(TypeError, match=r"rules\[1\]: expected a rule"):
        attackers.optimizer([AdamW(), AdamW])
    odd = r"q_proj: expected an input \[rows of 2 attackers.*got \(3, 6, 32\)"
    with attackers.at_work(), pytest.raises(ValueError, match=odd):
        model(torch.ones(3, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"batches: expected as many samples in each, got \[2, 1\]"):
        joined([batch(0), {key: value[:1] for key, value in batch(3).items()}])
    with pytest.raises(ValueError, match="batches: expected the same keys in each"):
        joined([batch(0), {"input_ids": batch(3)["input_ids"]}])
    with pytest.raises(ValueError, match=r"alone where lengths differ, got .*position_ids"):
        joined([batch(0), {**batch(1), "position_ids": batch(1)["input_ids"]}])
    loss, silent = LanguageModelLoss(model), {**batch(0), "labels": torch.full_like(batch(0)["labels"], -100)}
    with pytest.raises(ValueError, match="batch: no token carries loss in number 1 of 2"):
        loss.each(joined([batch(0), silent]), 2)
    with pytest.raises(ValueError, match="count: expected a number of batches that divides 2 samples, got 3"):
        loss.each(batch(0), 3)

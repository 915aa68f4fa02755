"""One of two processes that check the nested engine under FSDP2 and DDP: ``python distributed_worker.py RANK STORE``.

The reference is one process, plain PyTorch on a copy: each inner step averages both ranks' gradients.
Prints a line per case; raises at the first that fails.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard import LanguageModelLoss, fsdp2
from fastguard.defenses.tar.step import TAR, Adversary
from fastguard.losses.pieces import joined
from fastguard.nested import (
    ActivationPerturbation,
    AdamW,
    LoRAAdversary,
    LoRAAttackers,
    PersistentAttacker,
    PerturbationLostError,
    Reference,
    SimulatedAttack,
    Weights,
    perturbed,
)
from fastguard.trainers import load, save
from tiny_models import assert_same_gradients, gradients, pair, tiny

STEPS, LR, DECAY, NORM, RHO = 3, 1e-2, 0.1, 0.7, 2.0
TOLERANCE = 1e-6
Grads = dict[str, Tensor]


def batch(i: int, rank: int) -> dict[str, Tensor]:
    one = pair(seed=10 * i + rank, length=7)[0]
    return {**one, "labels": one["input_ids"]}


def weigh(i: int) -> float:
    return 0.5 + i


# the model of a case --------------------------------------------------------------------------------------------------


def model_of(case: dict) -> nn.Module:
    """Equal on every rank and in the reference."""
    mixed, adapter = case.get("mixed"), case.get("adapter")
    model = tiny("llama", torch.float32 if mixed else torch.float64, num_hidden_layers=2)
    if adapter == "defender":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape).to(p))
    return model


def trains(case: dict):
    return (lambda name, p: ".adversary." in name) if case.get("adapter") == "adversary" else None


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shard(model: nn.Module, case: dict) -> nn.Module:
    layout = case["layout"]
    if layout.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view="bucket view" in layout)
    names = ("replicate", "shard") if "mesh" in case else ("shard",)
    how = {"mesh": init_device_mesh("cpu", case.get("mesh", (2,)), mesh_dim_names=names)}
    if case.get("mixed"):
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    base = base_of(model)
    for layer in base.model.layers:
        fully_shard(layer, **how)
    if layout == "norm and head":  # as accelerate groups them
        fully_shard([base.model.norm, base.lm_head], reshard_after_forward=False, **how)
    fully_shard(model, reshard_after_forward=case.get("reshard"), **how)
    return model


# the reference: one process -------------------------------------------------------------------------------------------


class Twin:
    """A copy whose gradients are the mean over both ranks' micro-batches, in bfloat16 products if the case says so."""

    def __init__(self, case: dict) -> None:
        self.model = model_of(case)
        if case.get("adapter") == "adversary":
            LoRAAdversary(self.model, rank=2)
        self.compute = copy.deepcopy(self.model)
        self.mixed = case.get("mixed")
        if self.mixed:
            for p in self.compute.parameters():
                p.data = p.data.bfloat16()

    def gradients(self, i: int) -> Grads:
        total: Grads = {}
        for rank in range(2):
            for name, g in self.of_rank(i, rank).items():
                total[name] = total.get(name, 0) + g / 2
        return total

    def of_rank(self, i: int, rank: int) -> Grads:
        self.load()
        self.compute(**batch(i, rank)).loss.backward()
        return {name: g.to(torch.float32 if self.mixed else g.dtype) for name, g in gradients(self.compute).items()}

    @torch.no_grad()
    def load(self) -> None:
        for p, q in zip(self.compute.parameters(), self.model.parameters(), strict=True):
            p.copy_(q)


@functools.cache
def reference(kind: str, mixed: bool, adapter: str | None) -> dict:
    case = {"mixed": mixed, "adapter": adapter}
    twin = Twin(case)
    if kind == "attack":
        chosen = trains(case)
        moves = [(n, p) for n, p in twin.model.named_parameters() if p.requires_grad and (not chosen or chosen(n, p))]
        optimizer = torch.optim.AdamW([p for _, p in moves], lr=LR, weight_decay=DECAY)
        read = {n for n, p in twin.model.named_parameters() if p.requires_grad and not (chosen and chosen(n, p))}
        total = {n: g for n, g in twin.gradients(7).items() if n in read}
        for i in range(STEPS):
            found = twin.gradients(i)
            for name, p in moves:
                p.grad = found[name]
            optimizer.step()
            for name, g in twin.gradients(100).items():
                if name in read:
                    total[name] = total[name] + weigh(i) * g
        return total
    if kind == "perturbed":
        direction = twin.gradients(0)
        length = torch.stack([g.double().norm() for g in direction.values()]).norm()
        with torch.no_grad():
            for name, p in twin.model.named_parameters():
                if name in direction:
                    p.add_(direction[name], alpha=NORM / (length.item() + 1e-7))
        return twin.gradients(1)
    if kind == "reference":
        twin.load()
        with torch.no_grad(), twin.compute.disable_adapter() if adapter else contextlib.nullcontext():
            return {rank: twin.compute(**batch(5, rank)).logits for rank in range(2)}
    assert kind == "activations"
    return shifted(twin)


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in base_of(model).model.layers]


def shifted(twin: Twin) -> Grads:
    """Vaccine's step, each micro-batch along its own gradient."""
    total: Grads = {}
    twin.load()
    for rank in range(2):
        outputs: list[Tensor] = []
        hooks = [m.register_forward_hook(lambda m, a, out: outputs.append(out[0])) for m in attentions(twin.compute)]
        loss = twin.compute(**batch(0, rank)).loss
        found = torch.autograd.grad(loss, outputs)
        for hook in hooks:
            hook.remove()
        length = torch.stack([g.double().norm() for g in found]).norm().item()
        left = iter(found)
        hooks = [
            m.register_forward_hook(lambda m, a, out: (out[0] + next(left) * (RHO / (length + 1e-7)), *out[1:]))
            for m in attentions(twin.compute)
        ]
        twin.compute(**batch(0, rank)).loss.backward()
        for hook in hooks:
            hook.remove()
        for name, g in gradients(twin.compute).items():
            total[name] = total.get(name, 0) + g.to(torch.float32 if twin.mixed else g.dtype) / 2
    return total


# what is tested -------------------------------------------------------------------------------------------------------


class Subject:
    """The model of a case on this rank, and what must not change about it."""

    def __init__(self, case: dict, rank: int) -> None:
        self.case, self.rank = case, rank
        model = model_of(case)
        self.adversary = LoRAAdversary(model, rank=2) if case.get("adapter") == "adversary" else None
        if case.get("checkpointing"):
            base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
        self.inner = model
        self.early = Reference(model) if case.get("early") else None
        self.wrapped = shard(model, case)
        self.tolerance = case.get("tolerance", TOLERANCE)

    def loss(self, i: int) -> Tensor:
        return self.wrapped(**batch(i, self.rank)).loss

    def quiet(self) -> None:
        """A forward without backward leaves FSDP's root gathered, and the next forward on a stale copy."""
        if self.case.get("quiet"):
            with torch.no_grad():
                self.loss(3)

    def unsynchronised(self) -> contextlib.AbstractContextManager:
        """What a trainer runs all but the last micro-batch in."""
        if not self.case.get("no_sync"):
            return contextlib.nullcontext()
        if hasattr(self.wrapped, "no_sync"):
            return self.wrapped.no_sync()
        self.wrapped.set_requires_gradient_sync(False)
        stack = contextlib.ExitStack()
        stack.callback(self.wrapped.set_requires_gradient_sync, True)
        return stack

    def bits(self) -> dict[str, Tensor]:
        Weights(self.wrapped)  # reshards
        return {name: local(p.detach()).clone() for name, p in self.wrapped.named_parameters()}

    def gradients(self) -> Grads:
        return {
            name.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g
            for name, g in gradients(self.wrapped).items()
        }

    def expected(self, kind: str) -> dict:
        return reference(kind, bool(self.case.get("mixed")), self.case.get("adapter"))


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


@contextlib.contextmanager
def untouched(subject: Subject):
    before = subject.bits()
    yield
    for name, value in subject.bits().items():
        assert torch.equal(value, before[name]), f"{name} is not bit for bit what it was"


def simulated_attack(subject: Subject, functions: bool = False) -> None:
    """``functions``: losses are given as such, and seen to make and reduce no gradient that is not wanted.

    They come first then, before FSDP2 has seen the base's gradients.
    """
    adversary = subject.adversary
    attack = SimulatedAttack(
        subject.inner, AdamW(lr=LR, weight_decay=DECAY),
        trains=adversary.trains if adversary else None, reads=adversary.reads if adversary else None,
    )  # fmt: skip
    if not functions:
        defend(subject)
    subject.quiet()
    with untouched(subject), subject.unsynchronised(), attack.at(subject.wrapped) as tampered:
        for i in range(STEPS):
            if functions:
                with reduced(subject.wrapped) as names:
                    tampered.step(functools.partial(subject.loss, i))
                assert names and all(".adversary." in name for name in names), names
                with reduced(subject.wrapped) as names:
                    half = functools.partial(subject.loss, 100)
                    tampered.accumulate([(half, 0.5), (half, 0.5)], weight=weigh(i))
                assert names and not any(".adversary." in name for name in names), names
                continue
            tampered.step(subject.loss(i))
            subject.quiet()
            tampered.accumulate(subject.loss(100), weight=weigh(i))
        subject.quiet()
    if functions:
        defend(subject)
    assert_same_gradients(subject.gradients(), subject.expected("attack"), subject.tolerance)


def defend(subject: Subject) -> None:
    """A gradient of the defender's parameters alone, beside the attack's."""
    subject.loss(7).backward()
    for name, p in subject.wrapped.named_parameters():
        if subject.adversary and subject.adversary.trains(name, p):
            p.grad = None


def adapters_alone(subject: Subject) -> None:
    if subject.adversary:
        simulated_attack(subject, functions=True)


@contextlib.contextmanager
def reduced(wrapped: nn.Module) -> Iterator[list[str]]:
    """The parameters of which somebody makes a gradient, or FSDP2 or DDP reduces one."""
    names: list[str] = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda p, name=name: names.append(name))
        for name, p in wrapped.named_parameters() if p.requires_grad
    ]  # fmt: skip
    try:
        with overheard("foreach_reduce", lambda params: names.extend(p._param_fqn for p in params)):
            yield names
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def overheard(name: str, hear: Callable[[list[Any]], None]) -> Iterator[None]:
    """Each time FSDP2 calls one of its collectives, ``hear`` is told of the parameters."""
    own = getattr(fsdp_param_group, name)

    def heard(params: list[Any], *rest: Any) -> Any:
        hear(params)
        return own(params, *rest)

    setattr(fsdp_param_group, name, heard)
    try:
        yield
    finally:
        setattr(fsdp_param_group, name, own)


def one_step(subject: Subject) -> None:
    if subject.adversary:
        return
    weights = Weights(subject.wrapped)
    with untouched(subject), subject.unsynchronised():
        weights.prepare()
        subject.loss(0).backward()
        direction = weights.take_gradients()
        subject.quiet()
        through = torch.bfloat16 if subject.case.get("mixed") else None
        with perturbed(weights, direction, NORM, through=through) as realised:
            subject.loss(1).backward()
            found = weights.take_gradients()
            subject.quiet()
        assert realised.cosine > (0.98 if subject.case.get("mixed") else 1 - 1e-9), realised
    weights.put_gradients(found)
    assert_same_gradients(subject.gradients(), subject.expected("perturbed"), subject.tolerance)


def initial_weights(subject: Subject) -> None:
    if subject.adversary:
        return
    initial = subject.early or Reference(subject.inner if subject.case["layout"].startswith("ddp") else subject.wrapped)
    assert (initial.bytes == 0) == (subject.case.get("adapter") == "defender")
    weights = Weights(subject.wrapped)
    with torch.no_grad():
        for t in weights.local():
            t.mul_(1.25)
    subject.quiet()
    with untouched(subject):
        with initial.installed(subject.wrapped) as model:
            logits = model(**batch(5, subject.rank)).logits
        theirs = subject.expected("reference")[subject.rank]
        assert (logits - theirs).abs().max() <= subject.tolerance * theirs.abs().max()
        with torch.no_grad():
            assert not torch.allclose(subject.wrapped(**batch(5, subject.rank)).logits, theirs, rtol=1e-3)
    with torch.no_grad():
        for t in weights.local():
            t.div_(1.25)


def activations(subject: Subject) -> None:
    if subject.adversary or subject.case.get("mixed"):
        return
    moved = ActivationPerturbation(subject.inner, attentions(subject.inner), rho=RHO)
    forward = subject.inner if subject.case["layout"].startswith("ddp") else subject.wrapped
    with untouched(subject):
        subject.quiet()
        shifts = moved.record(lambda: forward(**batch(0, subject.rank)).loss)
        assert not gradients(subject.wrapped)
        with moved.applied(shifts) as applied:
            loss = applied.bound(subject.loss(0))
        loss.backward()
    moved.close()
    assert_same_gradients(subject.gradients(), subject.expected("activations"), subject.tolerance)


class Cut(Exception):
    pass


def cut(module: nn.Module, *_) -> None:
    raise Cut("in the middle of a pass")


def refused(subject: Subject) -> None:
    """A loss that is NaN on one rank raises on both, as do gradients that wait unsynchronised; nothing is left behind,
    not even by a backward that was cut short."""
    attack = SimulatedAttack(subject.inner, AdamW(lr=LR))
    with untouched(subject):
        subject.loss(7).backward()
        earlier = {name: local(p.grad).clone() for name, p in subject.wrapped.named_parameters()}
        message = ("a loss is not finite on another rank", "attacker's loss at step 1 is nan")[subject.rank]
        with raises(FloatingPointError, message), attack.at(subject.wrapped) as tampered:
            tampered.step(subject.loss(0))
            tampered.accumulate(subject.loss(100))
            tampered.step(subject.loss(1) * (torch.nan if subject.rank == 1 else 1.0))
        for name, p in subject.wrapped.named_parameters():
            assert torch.equal(local(p.grad), earlier[name]), f"{name}: its earlier gradient is not as it was"
        gradients(subject.wrapped)
        mlp = base_of(subject.inner).model.layers[1].mlp
        registers = [mlp.register_forward_hook]
        if hasattr(subject.wrapped, "reshard"):  # DDP itself refuses to go on after half a backward
            registers.append(mlp.register_full_backward_hook)
        for register in registers:
            with raises(Cut, "in the middle"), attack.at(subject.wrapped) as tampered:
                tampered.step(subject.loss(0))
                hook = register(cut)
                try:
                    tampered.step(subject.loss(1))
                finally:
                    hook.remove()
        assert not gradients(subject.wrapped)
        if hasattr(subject.wrapped, "reshard"):
            switches = ["set_requires_gradient_sync"]
            if subject.case.get("mesh"):
                switches.append("set_requires_all_reduce")
            for switch in switches:
                getattr(subject.wrapped, switch)(False)
                subject.loss(0).backward()
                getattr(subject.wrapped, switch)(True)
                with raises(RuntimeError, "accumulated without synchronisation"), attack.at(subject.wrapped):
                    pass
                subject.loss(0).backward()  # takes the waiting gradients along
                gradients(subject.wrapped)
    simulated_attack(subject)  # nothing is left over
    if hasattr(subject.wrapped, "reshard"):  # last, as it changes the model
        subject.inner.register_parameter("unsharded", nn.Parameter(torch.zeros(2)))
        with raises(ValueError, "unsharded is not sharded, though others are"), attack.at(subject.wrapped):
            pass


class TwoRows(nn.Module):
    """Under two shards a row each: what the attacker moves on rank 0 is kept, on rank 1 it is far below the spacing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1e-4] * 64, [100.0] * 64], dtype=torch.bfloat16))

    def forward(self) -> Tensor:
        return self.weight[0, :32].float().sum() + self.weight[1].float().sum()


def narrow_shards(rank: int) -> None:
    """Whether an attack is refused is decided over all shards, and so by all ranks alike."""
    for sharded in (True, False):
        model = TwoRows()
        before = model.weight.detach().clone()
        wrapped = fully_shard(model) if sharded else DistributedDataParallel(model)
        attack = SimulatedAttack(model, AdamW(lr=1e-3, weight_decay=0.0))
        with raises(PerturbationLostError, r"cosine 0.57\d, norm ratio 0.57\d"), attack.at(wrapped) as tampered:
            tampered.step(wrapped())
        weights = Weights(wrapped)
        assert torch.equal(weights.local()[0], before[rank : rank + 1] if sharded else before)
    with SimulatedAttack(model, AdamW(lr=1e-3), masters="fp32").at(wrapped) as tampered:
        for _ in range(30):
            tampered.step(wrapped())
        mine = model.weight.detach().float()
        dist.all_reduce(other := mine.clone())
        assert torch.equal(other, 2 * mine)  # replicas draw the same masters


def several_attackers(layout: str, rank: int) -> None:
    """In one forward: their steps make and reduce no gradient of the base; what they do is one process's on both parts.

    Under FSDP2 they come to a model that is sharded already, as a run's do; there what is gathered may stay.
    """
    layers, found, gathers = {"num_hidden_layers": 2}, {}, {}
    for part, stays in ((None, False), (rank, False), (rank, True)):
        model = tiny("llama", torch.float64, **layers)
        loss = LanguageModelLoss(model, over_ranks=part is not None)
        wrapped = model if part is None else shard(model, {"layout": layout})
        attackers = LoRAAttackers(model, 2, rank=(1, 2))
        rule = attackers.optimizer([AdamW(lr=LR), AdamW(lr=3 * LR)])
        attack = SimulatedAttack(
            model, rule, trains=attackers.trains, reads=attackers.reads, beside=attackers.parameters,
            gathered=stays,
        )  # fmt: skip

        def together(number: int, loss: Any = loss, wrapped: nn.Module = wrapped, part: int | None = part) -> Tensor:
            of_ranks = [[batch(3 * number + i, of) for i in range(2)] for of in ((0, 1) if part is None else (part,))]
            of_attackers = [{k: torch.cat([b[k] for b in own]) for k in own[0]} for own in zip(*of_ranks, strict=True)]
            return loss.each(joined(of_attackers), 2, model=wrapped)

        with attackers.at_work(), attack.at(wrapped) as tampered:
            for i in range(STEPS):
                with reduced(wrapped) as names, gathered() as gathers[stays]:
                    tampered.step(lambda i=i: together(i).sum())
                    tampered.step(lambda i=i: together(i).sum())
                assert not names or part is None, names
                with reduced(wrapped) as names:
                    tampered.accumulate(lambda: together(100).mean(), weigh(i))
                assert names
        assert all(not m._get_fsdp_state()._fsdp_param_groups[0].is_unsharded for m in fsdp2.groups_of(model.modules()))
        loss.close()
        found[part, stays] = {
            name.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g
            for name, g in gradients(wrapped).items()
        }
    assert_same_gradients(found[rank, False], found[None, False], 1e-6)
    assert_same_gradients(found[rank, True], found[rank, False], 0.0)
    if layout != "ddp":  # each group once; else each for the forwards and the backwards of two steps
        assert sorted(gathers[True]) == sorted(set(gathers[False])) and len(gathers[False]) > 2 * len(gathers[True])


@contextlib.contextmanager
def gathered() -> Iterator[list[str]]:
    """The first parameters of the groups that FSDP2 gathers."""
    names: list[str] = []
    with overheard("foreach_all_gather", lambda params: names.append(params[0]._param_fqn)):
        yield names


class Kept(AdamW):
    """Keeps the gradients of the last step."""

    def start(self, tensors: Any) -> Any:
        running = super().start(tensors)
        step = running.step
        running.step = lambda given: (Kept.last.__setitem__(slice(None), given), step(given))
        return running

    last: ClassVar[list[Tensor]] = []


def narrow_reductions(rank: int) -> None:
    """Attackers' gradients are added up in bf16, by FSDP2 and by taps, the defender's as ever, whatever is raised."""
    model = tiny("llama", torch.float32, num_hidden_layers=2)
    loss = LanguageModelLoss(model, over_ranks=True)
    wrapped = shard(model, {"layout": "norm and head"})
    groups = list(fsdp2.parameter_groups(fsdp2.groups_of(model.modules())))

    def value() -> Tensor:
        return loss(batch(0, rank), model=wrapped)

    def fits(gradients: list[Tensor]) -> set[bool]:
        return {torch.equal(g, g.bfloat16().float()) for g in map(local, gradients)}

    cosines = {}
    for dtype in (torch.bfloat16, None):
        attack = SimulatedAttack(model, Kept(lr=LR), reduce_dtype=dtype)
        with attack.at(wrapped) as tampered:
            tampered.step(value)
            assert fits(Kept.last) == {dtype is not None}, dtype
            tampered.accumulate(value)
            cosines[dtype] = tampered.reduction_cosine
        assert fits(list(gradients(wrapped).values())) == {False}
        with raises(Cut, "in the middle"), attack.at(wrapped) as tampered:
            tampered.step(lambda: cut(model))
        assert {(g._reduce_dtype, g.mp_policy.reduce_dtype) for g in groups} == {(None, None)}
    assert cosines[None] is None and 0.99 < float(cosines[torch.bfloat16]) < 1 - 1e-7, cosines
    loss.close()
    tar = TAR(model, steps=1, every=1, count=1, representations=False, reduce_dtype=torch.bfloat16)
    attackers = [Adversary("one batch", LR, [batch(1, rank)])]
    figures = tar.backward(retain=batch(2, rank), tamper=batch(3, rank), adversaries=attackers, model=wrapped)
    assert 0.99 < float(figures["reduction_cosine"]) < 1 - 1e-7, figures
    tar.close()
    with raises(ValueError, "reduce_dtype: expected a model that FSDP2 shards, got one of DDP"):
        replica = DistributedDataParallel(nn.Linear(2, 1))
        with SimulatedAttack(replica, reduce_dtype=torch.bfloat16).at() as tampered:
            tampered.step(lambda: replica(torch.ones(1, 2)).sum())


def goes_on(attack: SimulatedAttack, attacker: PersistentAttacker, ranks: range, first: int, steps: int) -> Grads:
    """What the attacker's next steps give the defender, from the mean over the batches of these ranks."""

    def loss(i: int) -> Tensor:
        return sum(attack.model(**batch(i, rank)).loss for rank in ranks) / len(ranks)

    with attack.at(attacker=attacker) as tampered:
        for i in range(first, first + steps):
            tampered.step(functools.partial(loss, i))
        tampered.accumulate(functools.partial(loss, 100))
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients(attack.model).items()}


def kept_attacker(rank: int) -> None:
    """Beside shards as beside whole weights; the checkpoint is left for as many ranks, and for one."""
    found: list[Grads] = []
    folder = Path(sys.argv[2]).with_name("kept")
    for sharded in (False, True, "again"):
        model = tiny("llama", torch.float64, num_hidden_layers=2)
        if sharded:
            fully_shard(model)
        attack, attacker = SimulatedAttack(model, AdamW(lr=LR)), PersistentAttacker()
        optimizer, counted = torch.optim.AdamW(model.parameters(), lr=LR), {"attacker": attacker}
        ranks = range(rank, rank + 1) if sharded else range(2)
        if sharded == "again":
            assert load(folder, model, optimizer, counted) == 1 and attacker.taken == 2
        else:
            for p, g in goes_on(attack, attacker, ranks, 0, 2).items():
                assert g.isfinite().all(), p
            optimizer.step()
        if sharded is True:
            save(folder, 1, model, optimizer, counted)
        found.append(goes_on(attack, attacker, ranks, 2, 1))
    states = [{}, {}]
    dist.all_gather_object(states, attacker.state_dict())
    attacker.load_state_dict(states[0])  # as a trainer does that saves on the first rank
    with warnings.catch_warnings(record=True) as caught:
        goes_on(attack, attacker, ranks, 3, 1)
    assert attacker.taken == 1 and "begun anew" in str(caught[-1].message)
    assert_same_gradients(found[1], found[0], 1e-9)
    assert all(torch.equal(g, found[1][name]) for name, g in found[2].items())


@contextlib.contextmanager
def raises(kind: type[BaseException], pattern: str):
    try:
        yield
    except kind as error:
        assert re.search(pattern, str(error)), str(error)
        return
    raise AssertionError(f"no {kind.__name__}")


PIECES = {
    "attack by functions": adapters_alone,
    "attack": simulated_attack,
    "perturbed": one_step,
    "reference": initial_weights,
    "activations": activations,
    "refused": refused,
}

CASES: dict[str, dict] = {
    "root": {"layout": "root"},
    "root resharded": {"layout": "root", "reshard": True},
    "norm and head": {"layout": "norm and head", "early": True},
    "norm and head, checkpointing": {"layout": "norm and head", "checkpointing": True},
    "stale root, no_sync": {"layout": "root", "quiet": True, "no_sync": True},
    "bfloat16 products": {"layout": "norm and head", "mixed": True, "no_sync": True},
    "hybrid, 2 replicas": {"layout": "norm and head", "mesh": (2, 1), "early": True},
    "hybrid, 2 shards": {"layout": "root", "mesh": (1, 2), "no_sync": True},
    "defender's LoRA": {"layout": "norm and head", "adapter": "defender"},
    "adversary's LoRA": {"layout": "norm and head", "adapter": "adversary", "no_sync": True},
    "adversary's LoRA, bfloat16 products": {"layout": "norm and head", "adapter": "adversary", "mixed": True},
    "ddp": {"layout": "ddp", "no_sync": True},
    "ddp, bucket views": {"layout": "ddp, bucket view", "checkpointing": True},
    "ddp, adversary's LoRA": {"layout": "ddp", "adapter": "adversary"},
    "bfloat16 weights": {"alone": narrow_shards},
    "reductions in bfloat16": {"alone": narrow_reductions},
    "several attackers": {"alone": functools.partial(several_attackers, "norm and head")},
    "ddp, several attackers": {"alone": functools.partial(several_attackers, "ddp")},
    "persistent attacker": {"alone": kept_attacker},
}


def main() -> None:
    rank, store, only = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, case in CASES.items():
        if only and name not in only:
            continue
        if "alone" in case:
            case["alone"](rank)
            print(f"passed: {name}", flush=True)
            continue
        subject = Subject(case, rank)
        for piece, check in PIECES.items():
            if piece == "refused" and (case.get("adapter") or case.get("mixed")):
                continue
            try:
                check(subject)
            except BaseException as error:
                error.add_note(f"case: {name}, {piece}")
                raise
        print(f"passed: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

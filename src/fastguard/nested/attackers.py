"""Several simulated attackers in one forward: each trains LoRA adapters of his own on the one base of all.

The batch holds the rows of the first attacker, then those of the second, and so on (``losses.pieces.joined``). Every
adapted linear map computes its product for all rows at once; then each attacker's rows pass his own adapter, in one
product of N batches. The sum of the attackers' losses, each the mean over his own tokens, is differentiated once:
nothing that one attacker trains is in another's loss, so that the gradients are those of N separate attacks.

    attackers = LoRAAttackers(model, count=4, rank=8)            # before the first call of a compiled model
    attack = SimulatedAttack(model, trains=attackers.trains, reads=attackers.reads, beside=attackers.parameters)
    with attackers.at_work(), attack.at(optimizer=attackers.optimizer([AdamW(lr) for lr in rates])) as tampered:
        for batches in zip(*each):
            tampered.step(lambda: loss.each(joined(batches), 4).sum())
        tampered.accumulate(lambda: loss.each(joined([held_out] * 4), 4, "max_entropy").mean())

The adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) are no part of the model: it has hooks, which do nothing but in
`LoRAAttackers.at_work`, and nothing to save. So it may be sharded before or after; under FSDP2 its weights are gathered
once for all attackers. The adapters are whole on every rank, and their gradients averaged there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastguard.nested.guard import derived_seed
from fastguard.nested.optimizers import Optimizer, Running, as_rule
from fastguard.ops.precision import accumulation_dtype
from fastguard.ranks import tensor_parallel


class LoRAAttackers:
    """Adapters of ``count`` attackers, B A of rank r scaled by alpha / r, for one forward of all of them.

    B is 0 and A uniform in +-1 / sqrt(D), as in PEFT; an attack begins there, and leaves them so again.

    Args:
        model: plain, PEFT (the defender's adapters are then part of the base), sharded by FSDP2 or not.
        count: N. rank: of the adapters, one for all attackers or one each; different ones are padded for the product.
        alpha: their scale times the rank, one for all or one each.
        target_modules: ``all-linear``: every ``nn.Linear`` but the head; or names, of which a module's ends in one. A
            loss that reads the head by taps sees no adapter on it.
        seed: attacker i's A is a function of (seed, i), the same in every attack.

    Attributes:
        parameters: attacker by attacker, by name: A [D, r], B [O, r], in fp32 (float64 for a float64 map).

    Raises:
        ValueError: ranks that are not one a attacker, no module that is meant, one on the meta device or with integer
            weights, DoRA.
    """

    def __init__(
        self, model: nn.Module, count: int, rank: int | Sequence[int] = 8, alpha: float | Sequence[float] = 16,
        target_modules: str | Collection[str] = "all-linear", seed: int = 0,
    ) -> None:  # fmt: skip
        if isinstance(count, bool) or count < 1:
            raise ValueError(f"count: expected at least one attacker, got {count!r}")
        self.model, self.count = model, count
        ranks = _each(rank, count, "rank")
        self._scales = [a / r for a, r in zip(_each(alpha, count, "alpha"), ranks, strict=True)]
        self._linears = _linears(model, target_modules)
        self.parameters: dict[str, nn.Parameter] = {}
        for i in range(count):
            g = torch.Generator().manual_seed(derived_seed("attackers", seed, i))
            for name, linear in self._linears.items():
                self._add(i, name, linear, int(ranks[i]), g)
        self._at_work = False
        self._hooks = [m.register_forward_hook(partial(self._adapt, name)) for name, m in self._linears.items()]

    def _add(self, attacker: int, name: str, linear: nn.Linear, rank: int, g: torch.Generator) -> None:
        a = (2 * torch.rand(linear.in_features, rank, generator=g) - 1) / math.sqrt(linear.in_features)
        for factor, value in (("A", a), ("B", torch.zeros(linear.out_features, rank))):
            value = value.to(linear.weight.device, accumulation_dtype(linear.weight.dtype))
            self.parameters[_named(attacker, name, factor)] = nn.Parameter(value)

    def _adapt(self, name: str, linear: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """What the forward hook of a linear map makes of its output."""
        if not self._at_work:
            return None
        x = args[0]
        if x.dim() != 3 or x.shape[0] % self.count:
            raise ValueError(
                f"{name}: expected an input [rows of {self.count} attackers, tokens, features], got {tuple(x.shape)}; "
                "target_modules leaves such a module out"
            )
        rows = x.reshape(self.count, -1, x.shape[-1])
        a, b = (self._stacked(name, factor).to(x.dtype) for factor in "AB")
        base = output.reshape(self.count, -1, output.shape[-1])
        return torch.baddbmm(base, torch.bmm(rows, a), b.mT).view(output.shape)

    def _stacked(self, name: str, factor: str) -> Tensor:
        """[N, D or O, the largest rank]: what is padded is 0 on both sides and gets no gradient."""
        each: list[Tensor] = [self.parameters[_named(i, name, factor)] for i in range(self.count)]
        if factor == "B":
            each = [scale * p for scale, p in zip(self._scales, each, strict=True)]
        widest = max(p.shape[1] for p in each)
        return torch.stack([pad(p, (0, widest - p.shape[1])) for p in each])

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, batches are those of all attackers, as many rows of each; backwards too have to be inside.

        Raises ValueError where ranks that see the same data share the matrices.
        """
        if tensor_parallel(self.model):
            raise ValueError("model: expected one without tensor parallelism, whose maps adapters would have to follow")
        for i in range(self.count):
            for name, linear in self._linears.items():
                for p in (self.parameters[_named(i, name, factor)] for factor in "AB"):
                    p.data = p.data.to(linear.weight.device)
        self._at_work = True
        try:
            yield
        finally:
            self._at_work = False

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the attackers move the parameter."""
        return self.parameters.get(name) is parameter

    def reads(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the defender trains it."""
        return parameter.requires_grad and not self.trains(name, parameter)

    def optimizer(self, rules: Sequence[Optimizer]) -> Optimizer:
        """Each attacker's own rule on what he trains, as one for all of them."""
        if len(rules) != self.count:
            raise ValueError(f"rules: expected one for each of {self.count} attackers, got {len(rules)}")
        return _Apart([as_rule(rule, f"rules[{i}]") for i, rule in enumerate(rules)])

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


class _Apart:
    """Several optimizers, each on as many of the tensors, in their order."""

    def __init__(self, rules: Sequence[Optimizer]) -> None:
        self.rules = rules
        self.elementwise = all(getattr(rule, "elementwise", False) for rule in rules)

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.rules))

    def start(self, tensors: Sequence[Tensor]) -> Running:
        """See `Optimizer.start`."""
        parts = _parts(tensors, len(self.rules))
        return _AllRunning([rule.start(part) for rule, part in zip(self.rules, parts, strict=True)])


class _AllRunning:
    def __init__(self, running: Sequence[Running]) -> None:
        self.running = running

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for running, part in zip(self.running, _parts(gradients, len(self.running)), strict=True):
            running.step(part)


def _parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = len(items) // count
    return [items[i * size : (i + 1) * size] for i in range(count)]


def _named(attacker: int, name: str, factor: str) -> str:
    return f"attacker {attacker}: {name}.{factor}"


def _each(value: Any, count: int, name: str) -> list[float]:
    """One value an attacker, each above 0."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count or not all(v > 0 for v in values):
        raise ValueError(f"{name}: expected a number above 0, or one for each of {count} attackers, got {value!r}")
    return values


def _linears(model: nn.Module, targets: str | Collection[str]) -> dict[str, nn.Linear]:
    """The linear maps that are adapted, by name; those of PEFT's layers are their base layers."""
    if any(".lora_magnitude_vector." in name for name, _ in model.named_parameters()):
        raise ValueError("model: expected no DoRA, which scales what its base layers return")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(head, "base_layer", head)
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        short = f".{name.removesuffix('.base_layer')}"
        meant = module is not head if targets == "all-linear" else any(short.endswith(f".{t}") for t in targets)
        if not meant:
            continue
        if not module.weight.is_floating_point() or module.weight.device.type == "meta":
            raise ValueError(
                f"{name}: expected weights in floating point, on a device, got {module.weight.dtype} on "
                f"{module.weight.device}"
            )
        found[name] = module
    if not found:
        raise ValueError(f"target_modules: expected 'all-linear' or names of nn.Linear modules, got {targets!r}")
    return found

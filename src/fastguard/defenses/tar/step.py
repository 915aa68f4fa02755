"""Tamper-Resistant Safeguards (Tamirisa et al. 2024, arXiv 2408.00761): trained against simulated fine-tuning attacks.

One outer step, first order, from the weights w:

1. For each of A adversaries: w_0 = w, and K steps of a fresh AdamW on that adversary's batches give w_1 ... w_K. After
   every n-th of them the tamper-resistance loss of one held-out harmful batch is differentiated *at the tampered
   weights*.
2. gradient = sum over adversaries and read steps i of  s exp(lambda (i - (K - 1))) / A * grad TR(w_(i+1))
   + r * grad retain(w), with i counted from 0. It is applied at w by the caller's optimizer.

``TR`` is minus the entropy of the next-token distribution (``max_entropy``), or DPO on preference pairs. ``retain`` is
the cross-entropy of the retain batch plus the mean over all L + 1 hidden states of the mean L2 distance of a token's
state from the one that a frozen reference has.

Here no second model is resident: the reference's weights wait in host memory and change places with the live ones for
one forward (``nested.Reference``); nobody makes [B, T, V] logits or a difference of hidden states.

Where paper and code differ, the code is followed, since it made the released models:

* max entropy averages over *all* positions, padding and prompt included (``tamper_positions="labels"``: only those that
  carry loss), and so does the distance (``mask_padding`` leaves padding out);
* the held-out batch is fixed within an attack and drawn anew for the next (hand `TAR.backward` one an adversary);
* the code can drop the tamper gradient when its loss falls under a bound; the released runs switch that off, and it is
  left out here. So is the "linear_warmup" of an adversary, a constant factor on its learning rate that no run uses;
* its random numbers are unseeded per step and not saved; here every choice is a function of (seed, step);
* the released runs start from a model prepared by ``RandomMapping`` and take the *original* model for the reference:
  make ``nested.Reference`` before that stage and pass it on. Outer optimizer: schedule-free AdamW, lr 2e-5, 32 steps of
  warm-up, 750 steps with 8 retain and 4 attack samples on each GPU.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.defenses.tar.options import ADVERSARIES, PRESETS, TAMPER_LOSSES, Options
from fastguard.losses.language_model import dpo_loss
from fastguard.losses.pieces import joined, size
from fastguard.methods.passes import Batch, Loss, attended, inspect, positions, tokens
from fastguard.methods.training import Data, Figures, Passes, Role, Step, Training
from fastguard.nested.attack import SimulatedAttack, Tampered
from fastguard.nested.attackers import LoRAAttackers
from fastguard.nested.guard import derived_seed
from fastguard.nested.optimizers import AdamW, Optimizer
from fastguard.nested.persistent import PersistentAttacker
from fastguard.nested.reference import Reference
from fastguard.nested.snapshot import Where
from fastguard.nested.waiting import Waiting
from fastguard.nested.weights import Select

Pairs = Mapping[str, Batch]
Source = Callable[[int], Batch]

ADVERSARY = "adversary "
"""Roles of the adversaries' streams: this, and the corpus's name in ``kinds``."""


@dataclass(frozen=True)
class Adversary:
    """One simulated attacker: what it is called, its learning rate, and the batches that it trains on, one a step."""

    name: str
    lr: float
    batches: Iterable[Batch]


class TAR(Training):
    """Gradients of one TAR step; the caller owns the optimizer.

        tar = TAR(model)                                    # before compilation, DDP and FSDP2
        adversaries = tar.adversaries({"harmful": harmful.__getitem__, "retain": benign.__getitem__})
        figures = tar.backward(retain=batch, tamper=held_out, adversaries=adversaries)
        optimizer.step(); optimizer.zero_grad()

    Cost: K + K / n forward and backward passes an adversary, one of each for the retain batch, one forward of the
    reference. Memory above a training step: one snapshot of the weights, the adversary's moments, an accumulator, and
    in the retain pass, when these are gone, the reference's states.

    Args:
        model: a Hugging Face causal language model, also PEFT (its adapters are then what defender and attackers train,
            and the reference is the model without them).
        steps: K. every: n; the gradient is read after every n-th step.
        lrs: an adversary's learning rate is one of these.
        kinds: of adversaries, equally likely; each names the corpus it trains on, or two: the first up to the switch
            point. The defaults are those of the released cyber run, `preset` has the biology run's.
        switch: (a, b); the switch point is floor(Beta(a, b) * K).
        count: A, adversaries a step.
        adversary: what they train. ``weights``: those that the defender trains, published. ``lora``, a deviation:
            adapters of rank ``adversary_rank``, scaled by 2, on all linear maps but the head, each his own. The base
            has no gradient in their steps, and all of them pass in one forward (``nested.LoRAAttackers``), as does what
            is read at their models. They are other attackers than the published ones; adapters want learning rates
            some ten times those of ``lrs``.
        schedule: lambda of the weights; None weighs every read by 1 / K, as the code without its schedule.
        grad_scale: s. The DPO script takes 0.1, with K = 8, every step read and two adversaries.
        tamper_loss: ``max_entropy`` (the released weaponisation runs), ``dpo``, or a callable of (model, batch).
        tamper_positions: of max entropy: ``all`` (published) or ``labels``, see ``LanguageModelLoss``.
        beta: of DPO.
        retain_weight: r. representations: whether the retain loss has the distance (the DPO script has none).
        mask_padding: keep padding out of the distance; published: it counts.
        reference: of the distance and of DPO; None: the model as it is now.
        states_on: where the reference's states wait; None: where they arise.
        outer_states: bytes of the training optimizer's states (see `trained_by`) that may stay on the device while
            adversaries attack; the others wait in host memory. None: all stay.
        loss: the language-model loss of attackers and retain batch, of (model, batch); None: cross-entropy.
        optimizer: from a learning rate to the attackers' optimizer.
        trains, reads, snapshot, masters, allow_lost: see ``nested.SimulatedAttack``; for a LoRA attacker of one's own
            ``nested.LoRAAdversary``'s.
        reduce_dtype: in which FSDP2 adds up the gradients of the attackers' steps; a deviation, whose size the figure
            ``reduction_cosine`` says (see ``nested.SimulatedAttack``). None: as the model was sharded.
        persistent, fresh: a deviation from the paper. An attacker is kept from step to step as a difference to the
            defender's moving weights, with his optimizer; he goes ``fresh`` steps further in each, and a new one begins
            when he has gone K. A step then costs fresh / K of the cold ones' passes (an eighth, as K is 64), for a
            gradient at weights that the attacker reached while the defender moved: docs/demo.md says what came
            of it. Every n-th of the fresh steps is read, or the last where there are fewer than n, with the weight of
            the step that he has reached: reads too are fresh / K as many, and ``grad_scale`` weighs so much less
            beside the retain loss. Takes weights in fp32, or ``masters``.
        gathered: for ``lora``, where the whole model has room on each GPU: FSDP2 gathers it once for the attackers'
            steps from one read to the next, instead of twice a step.
        batch, held_out: samples of the attackers' batches and of the one read at their weights, where a run draws
            them (published: 4 and 8); None: the run's pairs.
        micro: samples that pass through the model at a time, at most; see ``methods.training.Training``.
        seed: of all that is drawn.

    Attributes:
        step: backwards so far. state_bytes: of the reference's states in the last step, (L + 1) B T D elements.

    Raises:
        ValueError: an argument outside its range, or a model whose structure is not found; with ``lora`` also ``loss``,
            a ``tamper_loss`` of one's own, ``trains``, ``reduce_dtype``, ``persistent``, or fewer ``micro`` samples
            than attackers.
    """

    reads_output = True

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = Options.inner_steps,
        every: int = Options.read_every,
        lrs: Sequence[float] = Options.inner_lr,
        kinds: Sequence[Sequence[str]] = (("harmful",), ("retain", "harmful")),
        switch: tuple[float, float] = (6.0, 3.0),
        count: int = Options.adversaries,
        adversary: str = Options.adversary,
        adversary_rank: int = Options.adversary_rank,
        schedule: float | None = 0.0625,
        grad_scale: float = Options.grad_scale,
        tamper_loss: str | Loss = Options.tamper_loss,
        tamper_positions: str = "all",
        beta: float = 0.1,
        retain_weight: float = 1.0,
        representations: bool = True,
        mask_padding: bool = False,
        reference: Reference | None = None,
        states_on: torch.device | str | None = None,
        outer_states: int | None = None,
        loss: Loss | None = None,
        optimizer: Callable[[float], Optimizer] = AdamW,
        trains: Select = None,
        reads: Select = None,
        snapshot: Where = "device",
        masters: str | None = None,
        allow_lost: bool = False,
        reduce_dtype: torch.dtype | None = None,
        persistent: bool = False,
        fresh: int = Options.fresh,
        gathered: bool = Options.gathered,
        batch: int | None = None,
        held_out: int | None = None,
        micro: int | None = None,
        seed: int = 0,
    ) -> None:
        _require(1 <= every <= steps, "every", every, f"1 to steps ({steps}): the gradient must be read at least once")
        _require(not persistent or 1 <= fresh <= steps, "fresh", fresh, f"1 to steps ({steps})")
        _require(count >= 1, "count", count, "at least one adversary")
        _require(len(lrs) > 0 and all(lr > 0 for lr in lrs), "lrs", lrs, "learning rates above 0")
        _require(len(kinds) > 0 and all(len(k) in (1, 2) for k in kinds), "kinds", kinds, "tuples of one corpus or two")
        _require(all(x > 0 for x in switch), "switch", switch, "two numbers above 0")
        _require(callable(tamper_loss) or tamper_loss in TAMPER_LOSSES, "tamper_loss", tamper_loss, str(TAMPER_LOSSES))
        _require(adversary in ADVERSARIES, "adversary", adversary, str(ADVERSARIES))
        if adversary == "lora":
            own = {"loss": loss, "tamper_loss": tamper_loss if callable(tamper_loss) else None, "trains": trains,
                   "reduce_dtype": reduce_dtype, "persistent": persistent or None}  # fmt: skip
            for name, value in own.items():
                _require(value is None, name, value, "none with adversary='lora'")
            _require(micro is None or micro >= count, "micro", micro, f"a sample of each of {count} attackers at least")
        _require(not gathered or adversary == "lora", "gathered", gathered, "False unless adversary is 'lora'")
        super().__init__(model, loss=loss, seed=seed, reads=reads, micro=micro)
        self.steps, self.every, self.count = steps, every, count
        self.persistent, self.fresh = persistent, fresh if persistent else steps
        self._attackers: dict[int, PersistentAttacker] = {}
        self.lrs, self.kinds, self.switch = tuple(lrs), tuple(tuple(k) for k in kinds), switch
        self.schedule, self.grad_scale, self.retain_weight = schedule, grad_scale, retain_weight
        self.tamper_loss, self.tamper_positions, self.beta = tamper_loss, tamper_positions, beta
        self.representations, self.mask_padding, self.states_on = representations, mask_padding, states_on
        self.optimizer, self.given_loss = optimizer, loss
        self.outer_states = outer_states
        self._waiting: Waiting | None = None
        if reference is None and (representations or tamper_loss == "dpo"):
            reference = Reference(model, reads)
        self.reference = reference
        self.state_bytes = 0
        self.attackers: LoRAAttackers | None = None
        beside = None
        if adversary == "lora":
            self.attackers = LoRAAttackers(model, count, adversary_rank, alpha=2 * adversary_rank, seed=seed)
            trains, beside = self.attackers.trains, self.attackers.parameters
            reads = self.attackers.reads if reads is None else reads
        self.attack = SimulatedAttack(
            model, trains=trains, reads=reads, beside=beside, snapshot=snapshot, masters=masters,
            allow_lost=allow_lost, reduce_dtype=reduce_dtype, gathered=gathered, seed=seed,
        )  # fmt: skip
        corpora = dict.fromkeys(name for kind in self.kinds for name in kind)
        self.roles = {
            "retain": Role("safe"),
            "tamper": Role("preference" if tamper_loss == "dpo" else "held_out", held_out),
            **{ADVERSARY + n: Role("benign" if n == "retain" else "attacker", batch) for n in corpora},
        }

    @classmethod
    def preset(cls, model: nn.Module, name: str, **changes: Any) -> TAR:
        """A released run's settings, ``changes`` on top: ``cyber`` (the defaults) or ``bio``.

        ``bio`` has a lower learning rate among its attackers', and a second harmful corpus, ``harmful_other``.
        """
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(model, **{**PRESETS[name], **changes})

    @classmethod
    def from_options(cls, model: nn.Module, options: Options, *, seed: int = 0) -> TAR:  # type: ignore[override]
        """See `Training.from_options`."""
        o = options
        return cls(
            model, steps=o.inner_steps, every=o.read_every, lrs=o.inner_lr, count=o.adversaries,
            adversary=o.adversary, adversary_rank=o.adversary_rank, gathered=o.gathered,
            grad_scale=o.grad_scale, tamper_loss=o.tamper_loss, batch=o.batch, held_out=o.held_out,
            outer_states=o.outer_states, masters="fp32" if o.masters else None, micro=o.micro,
            reduce_dtype=torch.bfloat16 if o.bf16_reductions else None,
            persistent=o.persistent, fresh=o.fresh, seed=seed,
        )  # fmt: skip

    @property
    def reference_bytes(self) -> int:
        """Host memory of the reference's weights on this rank; 0 where adapters are switched off instead."""
        return 0 if self.reference is None else self.reference.bytes

    def weight(self, i: int) -> float:
        """The weight of the gradient that is read after step ``i``, counted from 0."""
        return 1 / self.steps if self.schedule is None else math.exp(self.schedule * (i - (self.steps - 1)))

    def leg(self) -> range:
        """The attackers' steps in the coming one of the defender's, counted from 0 at their beginning: all K of cold
        ones, ``fresh`` of persistent ones, or what is left of K.
        """
        gone = self.step % -(-self.steps // self.fresh) * self.fresh
        return range(gone, min(gone + self.fresh, self.steps))

    def adversaries(self, sources: Mapping[str, Source]) -> list[Adversary]:
        """The adversaries of the coming step, a function of (seed, step) alone, equal on every rank.

        Args:
            sources: by the corpora's names in ``kinds``: a function from a number to a batch. The numbers grow for ever
                and none comes twice, so that a source that is a function of its argument needs no state to be resumed.
        """
        if not isinstance(sources, Mapping) or not all(map(callable, sources.values())):
            raise ValueError(
                "sources: expected a mapping from the corpora's names to functions of a number, got "
                f"{type(sources).__name__}{f' of {sorted(sources)}' if isinstance(sources, Mapping) else ''}"
            )
        missing = {name for kind in self.kinds for name in kind} - sources.keys()
        _require(not missing, "sources", sorted(sources), f"also {sorted(missing)}")
        return [self._adversary(sources, index) for index in range(self.count)]

    def _adversary(self, sources: Mapping[str, Source], index: int) -> Adversary:
        leg = self.leg()
        draw = random.Random(derived_seed("tar", self.seed, self.step - leg.start // self.fresh, index))
        kind, lr = draw.choice(self.kinds), draw.choice(self.lrs)
        switch = int(draw.betavariate(*self.switch) * self.steps) if len(kind) == 2 else 0
        first = (self.step * self.count + index) * self.fresh
        names = [kind[0] if i < switch else kind[-1] for i in leg]
        name = kind[0] if len(kind) == 1 else f"{kind[0]}, from step {switch} {kind[1]}"
        return Adversary(name, lr, (sources[corpus](first + i) for i, corpus in enumerate(names)))

    def arguments(self) -> tuple[str, ...]:
        """See `Training.arguments`."""
        return ("retain", "tamper", "adversaries")

    def complete(self, batches: Mapping[str, Any], data: Data) -> dict[str, Any]:
        """With the coming step's adversaries, drawn from ``data``: ``adversary NAME``, or plain names of corpora."""
        given = {name: batch for name, batch in batches.items() if not name.startswith(ADVERSARY)}
        named = {name.removeprefix(ADVERSARY): data[name] for name in data if name.startswith(ADVERSARY)}
        return {"adversaries": self.adversaries(named or data), **given}

    def checked(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        """See `Training.checked`: with the adversaries' batches drawn, which are a few integers a token."""
        return super().checked({**batches, **self._drawn(batches)})

    def _drawn(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        adversaries, tamper = batches.get("adversaries"), batches.get("tamper")
        if adversaries is None or tamper is None:  # the names are refused
            return {}
        if not isinstance(adversaries, Sequence) or not all(isinstance(a, Adversary) for a in adversaries):
            raise ValueError(f"adversaries: expected a list of Adversary (TAR.adversaries), got {adversaries!r}")
        held_out = list(tamper) if isinstance(tamper, Sequence) else [tamper] * len(adversaries)
        _require(len(adversaries) > 0, "adversaries", len(adversaries), "at least one")
        together = self.attackers is None or len(adversaries) == self.count
        _require(together, "adversaries", len(adversaries), f"count ({self.count}) with adversary='lora'")
        _require(len(held_out) == len(adversaries), "tamper", len(held_out), f"one batch, or {len(adversaries)}")
        for batch in held_out if self.tamper_loss == "dpo" else ():
            _concatenated(batch)  # before adversaries are drawn from, whose batches may come once
        count = len(self.leg())
        drawn = [replace(a, batches=list(islice(a.batches, count))) for a in adversaries]
        for a in drawn:
            given = f"{len(a.batches)} batches"
            _require(len(a.batches) == count, f"adversary {a.name!r}", given, f"at least {count}")
        if self.attackers is not None:
            self._fit_together(drawn, held_out)
        return {"adversaries": drawn, "tamper": held_out}

    def _fit_together(self, adversaries: Sequence[Adversary], held_out: Sequence[Batch | Pairs]) -> None:
        """Raise, before the first pass, what keeps batches from passing in one forward."""
        for i, batches in enumerate(zip(*(a.batches for a in adversaries), strict=True)):
            joined(batches, f"adversaries, batch {i}")
        read: list[Any] = [_concatenated(b) if self.tamper_loss == "dpo" else b for b in held_out]
        joined(read, "tamper")
        if self.tamper_loss == "max_entropy" and self.tamper_positions == "all":
            shapes = sorted({tuple(b["input_ids"].shape) for b in read})
            _require(len(shapes) == 1, "tamper", shapes, "batches of one shape, of which padding counts")

    def inspect(self, *, retain: Batch, tamper: Sequence[Any], adversaries: Sequence[Adversary]) -> None:  # type: ignore[override]
        """See `Training.inspect`."""
        read = {"retain": retain}
        for adversary in adversaries:
            read |= {f"adversary {adversary.name!r}, batch {i}": b for i, b in enumerate(adversary.batches)}
        if self.tamper_loss == "max_entropy" and self.tamper_positions == "labels":
            read |= {f"tamper, batch {i}": batch for i, batch in enumerate(tamper)}
        inspect(read)

    def gradient(  # type: ignore[override]
        self,
        step: Step,
        *,
        retain: Batch,
        tamper: Sequence[Batch | Pairs],
        adversaries: Sequence[Adversary],
    ) -> Figures:
        """One outer step.

        Args:
            retain: ``input_ids`` [B, T], ``attention_mask``, ``labels``; see ``LanguageModelLoss``.
            tamper: the held-out batch, or one an adversary (here it is that: see `checked`); for DPO ``{"chosen":
                batch, "rejected": batch}``.
            adversaries: see `adversaries`; each with a batch a step (see `leg`), or more.

        Returns:
            ``loss``, the sum that was differentiated; ``retain_ce`` and ``representation_distance``; ``tamper``, the
            mean of what was read, unweighted; ``attacker_first`` and ``attacker_last``, the attackers' mean loss before
            their first and last step; ``reduction_cosine``, where ``reduce_dtype`` is given and the model sharded, of
            their first steps' gradients to those that are added up as ever, the mean.

        Raises:
            ValueError: batches that do not fit, or too few. FloatingPointError: a loss is not finite.
        """
        figures = _Figures()
        with self._aside():
            if self.attackers is not None:
                self._attack_together(step, self.attackers, adversaries, tamper, figures)
            else:
                for index, (adversary, batch) in enumerate(zip(adversaries, tamper, strict=True)):
                    self._attack(step, adversary, batch, 1 / len(adversaries), figures, self._kept(index))
        self._retain(step, retain, figures)
        return figures.means()

    def trained_by(self, optimizer: Any) -> None:
        """See `Training.trained_by`; what ``outer_states`` is about."""
        if self.outer_states is not None and (self._waiting is None or self._waiting.optimizer is not optimizer):
            self._waiting = Waiting(optimizer, self.outer_states)

    def _aside(self) -> contextlib.AbstractContextManager[Any]:
        if self._waiting is not None:
            return self._waiting.away()
        _require(
            self.outer_states is None, "outer_states", self.outer_states, "None, or TAR.trained_by(optimizer) first"
        )
        return contextlib.nullcontext()

    def _kept(self, index: int) -> PersistentAttacker | None:
        """Who attacks in the place of this number: nobody is kept of cold attacks, nor of persistent ones that end."""
        if not self.persistent:
            return None
        attacker = self._attackers.setdefault(index, PersistentAttacker())
        if self.leg().start == 0:
            attacker.renew()
        return attacker

    def _attack(
        self, step: Step, adversary: Adversary, held_out: Batch | Pairs, share: float, figures: _Figures,
        attacker: PersistentAttacker | None,
    ) -> None:  # fmt: skip
        read = self._prepared(step, [held_out])
        with self.attack.at(step.model, self.optimizer(adversary.lr), attacker) as tampered:
            gone = attacker.taken if attacker is not None else 0  # asked inside, where he may have begun anew
            passes = (step.passes(step.loss, batch) for batch in adversary.batches)
            self._run(step, tampered, passes, read, share, figures, gone=gone)

    def _attack_together(
        self, step: Step, attackers: LoRAAttackers, adversaries: Sequence[Adversary], held_out: Sequence[Batch | Pairs],
        figures: _Figures,
    ) -> None:  # fmt: skip
        """All attackers in one forward: their losses are summed, what is read at their models is averaged."""
        read = self._prepared(step, held_out)
        rule = attackers.optimizer([self.optimizer(a.lr) for a in adversaries])
        each = zip(*(a.batches for a in adversaries), strict=True)
        with attackers.at_work(), self.attack.at(step.model, rule) as tampered:
            passes = (self._each(step, batches, "cross_entropy") for batches in each)
            self._run(step, tampered, passes, read, 1.0, figures, len(adversaries))

    def _run(
        self, step: Step, tampered: Tampered, passes: Iterable[Passes], read: Passes, share: float, figures: _Figures,
        attackers: int = 1, gone: int = 0,
    ) -> None:  # fmt: skip
        """Steps of an attack on ``passes``, sums of the losses of ``attackers``, and what the defender reads.

        gone: steps that were taken before.
        """
        steps = len(self.leg())
        every = min(self.every, steps)
        for i, own in enumerate(passes):
            loss = tampered.step(own)
            if i == 0 and tampered.reduction_cosine is not None:
                figures.note("reduction_cosine", tampered.reduction_cosine)
            if i in (0, steps - 1):
                figures.note("attacker_last" if i else "attacker_first", loss / attackers)
            if (i + 1) % every == 0:
                weight = self.grad_scale * self.weight(gone + i) * share
                loss = tampered.accumulate(read, step.scale * weight)
                figures.note("tamper", loss)
                figures.add("loss", weight * loss)

    def _each(
        self, step: Step, batches: Sequence[Batch], kind: str, where: str = "all",
        count: Callable[..., Tensor | int] = tokens, weight: float = 1.0,
    ) -> Passes:  # fmt: skip
        """``weight`` times the sum of the losses of batches of which each is another attacker's, in one forward."""
        pieces = zip(*(step.pieces(batch, count, len(batches)) for batch in batches), strict=True)

        def loss(own: Sequence[tuple[Batch, float]]) -> Tensor:
            together = joined([piece for piece, _ in own])
            each = self.language.each(together, len(own), kind, step.model, positions=where)
            return torch.stack([share * value for (_, share), value in zip(own, each, strict=True)]).sum()

        return [(partial(loss, own), weight) for own in pieces]

    def _prepared(self, step: Step, batches: Sequence[Any]) -> Passes:
        """The mean of the tamper losses of each attacker's batch; DPO asks the reference now, at the original weights.

        A loss of the caller's is of one attacker's alone.
        """
        kind, model, n = self.tamper_loss, step.model, len(batches)
        if callable(kind):
            return step.passes(lambda piece: step.mean(kind(model, piece), piece), batches[0])
        if kind == "max_entropy":
            where = self.tamper_positions
            return self._each(step, batches, kind, where, positions if where == "all" else tokens, 1 / n)
        each = zip(*(step.pieces(batch, size, n) for batch in batches), strict=True)
        pieces = [(joined([_concatenated(piece) for piece, _ in own]), own[0][1]) for own in each]

        def pairs_logp(pairs: Batch, model: nn.Module) -> Iterable[Tensor]:
            """Of the chosen and of the rejected answers, which follow one another in each attacker's rows."""
            return self.language.sequence_logp(pairs, model).view(n, 2, -1).unbind(1)

        with self._reference(model) as reference:
            before = [pairs_logp(pairs, reference) for pairs, _ in pieces]

        def preference(pairs: Batch, chosen_before: Tensor, rejected_before: Tensor) -> Tensor:
            chosen, rejected = pairs_logp(pairs, model)
            return dpo_loss(chosen, rejected, chosen_before, rejected_before, self.beta, step.ranks)

        return [(partial(preference, pairs, *own), share) for (pairs, share), own in zip(pieces, before, strict=True)]

    def _retain(self, step: Step, batch: Batch, figures: _Figures) -> None:
        """The retain loss and its backward, at the original weights; its dropout too is a function of (seed, step)."""
        pieces = step.pieces(batch)
        states: list[tuple[Tensor, ...] | None] = [None] * len(pieces)
        shares = [share for _, share in pieces]
        if self.representations:
            shares = [share for _, share in step.pieces(batch, self._counted)]
            with self._reference(step.model) as reference:
                states = [self.language.hidden_states(piece, reference, self.states_on) for piece, _ in pieces]
            self.state_bytes = sum(s.numel() * s.element_size() for own in states for s in own or ())
        each = zip(pieces, states, shares, strict=True)
        passes = [(partial(self._retain_loss, step, *one, figures), one[0][1]) for one in each]
        with step.random("tar retain"):
            value = step.differentiate(passes, "retain batch", step.scale * self.retain_weight)
        figures.add("loss", self.retain_weight * value)

    def _counted(self, batch: Batch) -> Tensor | int:
        """How many tokens the distance is the mean over."""
        return positions(batch, self._mask(batch))

    def _mask(self, batch: Batch) -> Tensor | None:
        return attended(batch, self.mask_padding)

    def _retain_loss(
        self, step: Step, piece: tuple[Batch, float], states: tuple[Tensor, ...] | None, apart: float, figures: _Figures
    ) -> Tensor:
        """Of a piece with its share of the cross-entropy, to be weighted by that; ``apart``: its share of distances."""
        batch, share = piece
        if states is None:
            loss = step.loss(batch)
            figures.add("retain_ce", share * loss.detach())
            return loss
        kind = "cross_entropy" if self.given_loss is None else None
        loss = self.language(
            batch, kind, step.model, distance_to=states, distance_mask=self._mask(batch), distance_weight=apart / share
        )
        parts = self.language.components
        figures.add("representation_distance", apart * parts["representation_distance"])
        if kind is None:
            ce = step.loss(batch)
            figures.add("retain_ce", share * ce.detach())
            return loss + ce
        figures.add("retain_ce", share * parts["cross_entropy"])
        return loss

    def _reference(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The reference in the model's place, without dropout."""
        assert self.reference is not None
        return self.reference.consulted(model)

    def close(self) -> None:
        """See `Training.close`."""
        super().close()
        if self.attackers is not None:
            self.attackers.remove()

    def state_dict(self) -> dict[str, Any]:
        """Counters, with which a new object goes on as this one would.

        Without ``reference=``, make that object while the model is the one that the run began with, and load the
        trained weights into the model afterwards.
        """
        kept = {"attackers": {i: a.state_dict() for i, a in self._attackers.items()}} if self.persistent else {}
        return {"step": self.step, **self.attack.state_dict(), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Training.load_state_dict`."""
        super().load_state_dict(state)
        self.attack.load_state_dict(dict(state))
        self._attackers = {}
        for index, kept in state.get("attackers", {}).items():
            self._attackers[index] = PersistentAttacker()
            self._attackers[index].load_state_dict(kept)


class _Figures:
    """Sums and means of what a step saw, without a wait for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._noted: dict[str, list[Tensor]] = {}

    def note(self, name: str, value: Tensor) -> None:
        self._noted.setdefault(name, []).append(value.detach())

    def add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, Tensor]:
        return {**self._sums, **{name: torch.stack(values).mean() for name, values in self._noted.items()}}


def _concatenated(batch: Batch | Pairs) -> dict[str, Tensor]:
    """Chosen and rejected answers as one batch, padded on the right to one length."""
    both = [batch.get("chosen"), batch.get("rejected")]
    if not all(isinstance(b, Mapping) and "input_ids" in b for b in both):
        raise ValueError(f"tamper: DPO needs batches under 'chosen' and 'rejected', got {sorted(batch)}")
    sizes = [b["input_ids"].shape[0] for b in both]  # type: ignore[index]
    _require(sizes[0] == sizes[1], "tamper", f"{sizes[0]} chosen, {sizes[1]} rejected", "pairs")
    length = max(b["input_ids"].shape[1] for b in both)  # type: ignore[index]
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    parts: dict[str, list[Tensor]] = {name: [] for name in fill}
    for part in both:
        ids = part["input_ids"]  # type: ignore[index]
        mask = part.get("attention_mask", torch.ones_like(ids))  # type: ignore[union-attr]
        labels = part.get("labels", ids.masked_fill(mask == 0, -100))  # type: ignore[union-attr]
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
            parts[name].append(nn.functional.pad(value, (0, length - value.shape[1]), value=fill[name]))
    return {name: torch.cat(values) for name, values in parts.items()}


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")

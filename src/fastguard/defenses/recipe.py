"""From a configuration to an immunized model: which defense, on which batches, for how long.

Every method trains on the same data: requests answered by a compliance placeholder (harmful), the same requests
    answered by a refusal, and ordinary instructions (together: harmless). RepNoise reads them as pairs; the nested
    defenses use the harmful half for their simulated attacker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fastguard.config import ImmunizeConfig
from fastguard.data.chat import Encoded, collate, endless, endless_indices
from fastguard.data.corpus import Corpus
from fastguard.defenses import repnoise
from fastguard.evaluation.metrics import Training
from fastguard.training import train, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]
Step = Callable[[], dict[str, Tensor]]


class Defense(Protocol):
    """What the nested defenses have in common."""

    def close(self) -> None:
        """Take the hooks off the model."""


def immunize(
    model: PreTrainedModel, corpus: Corpus, config: ImmunizeConfig, report: Callable[[float, str], None]
) -> Training:
    """Train ``model`` IN PLACE with the defense that ``config.method`` names."""
    if config.method == "repnoise":
        return repnoise.immunize(model, corpus, config, report)
    trainable(model, config.freeze_embedding)  # before the defense looks at what is trained
    defense, step = _MAKERS[config.method](model, _Batches(corpus, config, str(model.device)), config)

    def loss() -> tuple[Tensor, dict[str, float]]:
        figures = step()
        return figures["loss"], {name: float(value) for name, value in figures.items() if name != "loss"}

    try:
        steps, wall, curve = train(
            model, loss, config.lr, steps=config.steps, warmup=config.warmup,
            freeze_embedding=config.freeze_embedding, report=report,
        )  # fmt: skip
    finally:
        defense.close()
    return Training(parent="aligned", method=describe(config), steps=steps, wall_s=wall, lr=config.lr, curve=curve)


def describe(config: ImmunizeConfig) -> str:
    """One line for a reader."""
    data = f"{config.pairs} refusals and {config.retain} harmless answers a step"
    if config.method == "tar":
        part = config.tar
        return (
            f"TAR: {part.adversaries} adversary of {part.inner_steps} steps, {part.tamper_loss} read every "
            f"{part.read_every} (scale {part.grad_scale:g}), {data}"
        )
    if config.method == "booster":
        return f"Booster: alpha {config.booster.alpha:g}, lambda {config.booster.lam:g}, {data}"
    if config.method == "vaccine":
        return f"Vaccine: rho {config.vaccine.rho:g}, {data}"
    return f"T-Vaccine: rho {config.vaccine.t_rho:g} on {config.vaccine.layers} layers, {data}"


class _Batches:
    """The batches of a run; the harmful requests are divided between attackers and held-out batch."""

    def __init__(self, corpus: Corpus, config: ImmunizeConfig, device: str) -> None:
        self.pad, self.device = corpus.pad, device
        self.requests = corpus.harmful["immunize"]
        self.refusals = corpus.safe["immunize"]  # of the same requests, item by item
        self.instructions = corpus.harmless["immunize"]
        self._safe = endless(corpus.safe["immunize"], config.pairs, config.seed)
        self._retain = endless(corpus.harmless["immunize"], config.retain, config.seed + 1)

    def collate(self, rows: list[Encoded]) -> Batch:
        """One batch on the model's device."""
        return collate(rows, self.pad, self.device)

    def harmless(self) -> Batch:
        """Refusals and ordinary answers, together."""
        return self.collate([*next(self._safe), *next(self._retain)])

    def draws(self, rows: list[Encoded], count: int, seed: int) -> Iterator[Batch]:
        """Batches of ``count`` of ``rows``, for ever."""
        return (self.collate(chosen) for chosen in endless(rows, count, seed))


def _tar(model: PreTrainedModel, batches: _Batches, config: ImmunizeConfig) -> tuple[Defense, Step]:
    from fastguard.defenses.tar import TAR

    part = config.tar
    tar = TAR(
        model, steps=part.inner_steps, every=part.read_every, lrs=part.inner_lr, count=part.adversaries,
        grad_scale=part.grad_scale, tamper_loss=part.tamper_loss, seed=config.seed,
    )  # fmt: skip
    middle = max(len(batches.requests) // 2, 1)
    harmful = batches.draws(batches.requests[:middle], part.batch, config.seed + 2)
    benign = batches.draws(batches.instructions, part.batch, config.seed + 3)
    sources = {"harmful": lambda number: next(harmful), "retain": lambda number: next(benign)}
    held_out = range(middle % len(batches.requests), len(batches.requests))
    drawn = endless_indices(len(held_out), part.batch, config.seed + 4)

    def tamper() -> Any:
        at = [held_out[i] for i in next(drawn)]
        harmful = batches.collate([batches.requests[i] for i in at])
        if part.tamper_loss != "dpo":
            return harmful
        return {"chosen": batches.collate([batches.refusals[i] for i in at]), "rejected": harmful}

    def step() -> dict[str, Tensor]:
        return tar.backward(retain=batches.harmless(), tamper=tamper(), adversaries=tar.adversaries(sources))

    return tar, step


def _booster(model: PreTrainedModel, batches: _Batches, config: ImmunizeConfig) -> tuple[Defense, Step]:
    from fastguard.defenses.booster import Booster

    part = config.booster
    booster = Booster(model, alpha=part.alpha, lam=part.lam, mode=part.mode)
    harmful = batches.draws(batches.requests, config.pairs, config.seed + 2)
    return booster, lambda: booster.backward(harmful=next(harmful), harmless=batches.harmless())


def _vaccine(model: PreTrainedModel, batches: _Batches, config: ImmunizeConfig) -> tuple[Defense, Step]:
    from fastguard.defenses.vaccine import Vaccine

    vaccine = Vaccine(model, rho=config.vaccine.rho)
    return vaccine, lambda: vaccine.backward(harmless=batches.harmless())


def _t_vaccine(model: PreTrainedModel, batches: _Batches, config: ImmunizeConfig) -> tuple[Defense, Step]:
    from fastguard.defenses.vaccine import TVaccine

    part = config.vaccine
    vaccine = TVaccine(
        model, rho=part.t_rho, layers=part.layers, every=part.every, probe_every=part.probe_every, seed=config.seed
    )
    harmful = batches.draws(batches.requests, 1, config.seed + 2)
    return vaccine, lambda: vaccine.backward(harmful=next(harmful), harmless=batches.harmless())


_MAKERS: dict[str, Callable[..., tuple[Defense, Step]]] = {
    "tar": _tar,
    "booster": _booster,
    "vaccine": _vaccine,
    "t_vaccine": _t_vaccine,
}

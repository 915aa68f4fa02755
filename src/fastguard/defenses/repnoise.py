"""Immunization by Representation Noising (Rosati et al. 2024, arXiv 2405.14577), and its control.

One step: a batch of requests, each with a compliance placeholder and a refusal, and a batch of ordinary
instructions to retain. The published loss has no retain term; in runs short enough for a laptop it costs the
model its usefulness without one. alpha weighs the ascent on the harmful answers, read from the output and, through
the model's own head, from its layers; beta weighs the noise asked of the MLP outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from fastguard.config import ImmunizeConfig
from fastguard.data.chat import collate, collate_pairs, endless, endless_indices
from fastguard.data.corpus import Corpus
from fastguard.evaluation.metrics import Training
from fastguard.evaluation.scores import answer_loss
from fastguard.losses.repnoise import RepNoiseLoss
from fastguard.training import LossFn, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[float, str], None]


def immunize(model: PreTrainedModel, corpus: Corpus, config: ImmunizeConfig, report: Report) -> Training:
    """Train ``model`` IN PLACE with RepNoise on the paired requests, and on retain data beside them."""
    harmful, safe = corpus.harmful["immunize"], corpus.safe["immunize"]
    pairs = endless_indices(len(harmful), config.pairs, config.seed)
    retain = endless(corpus.harmless["immunize"], config.retain, config.seed + 1)
    loss_fn = RepNoiseLoss(
        model, alpha=config.alpha, beta=config.beta, seed=config.seed, mask_padding=True, boundary=config.boundary,
        layers=config.layers, retain_weight=config.retain_weight, output_alpha=config.output_alpha,
    )  # fmt: skip

    def loss() -> tuple[Tensor, dict[str, float]]:
        chosen = next(pairs)
        bad, good = collate_pairs([harmful[i] for i in chosen], [safe[i] for i in chosen], corpus.pad, model.device)
        value = loss_fn(harmful=bad, harmless=good, retain=collate(next(retain), corpus.pad, model.device))
        parts = loss_fn.components
        figures = {name: float(parts[name]) for name in ("harmless_ce", "noise", "retain_ce")}
        figures["harmful_ce"] = float(parts["harmful_ce"][0])
        figures["lens_ce"] = float(parts["harmful_ce"][1:].nanmean())
        return value, figures

    total = config.steps + config.settle_steps
    try:
        steps, wall, curve = train(
            model, loss, config.lr, steps=config.steps, warmup=config.warmup,
            freeze_embedding=config.freeze_embedding,
            report=lambda fraction, text: report(fraction * config.steps / total, text),
        )  # fmt: skip
    finally:
        loss_fn.close()
    if config.settle_steps:
        more = train(
            model, _safe_and_retain(model, corpus, config, config.seed + 2), config.settle_lr,
            steps=config.settle_steps, freeze_embedding=config.freeze_embedding,
            report=lambda fraction, text: report((config.steps + fraction * config.settle_steps) / total, text),
        )  # fmt: skip
        curve += [{**point, "step": steps + point["step"]} for point in more[2]]
        steps, wall = steps + more[0], wall + more[1]
    method = (
        f"RepNoise: alpha {config.alpha:g}, beta {config.beta:g}, "
        f"{'all' if config.layers is None else config.layers} lens layers a step, "
        f"{config.pairs} pairs and {config.retain} harmless answers (weight {config.retain_weight:g}) a step"
        + (f"; output ascent {config.output_alpha:g}" if config.output_alpha else "")
        + (f"; last {config.settle_steps} steps on safe answers and retain data alone" if config.settle_steps else "")
    )
    return Training(parent="aligned", method=method, steps=steps, wall_s=wall, lr=config.lr, curve=curve)


def plain_control(
    model: PreTrainedModel, corpus: Corpus, config: ImmunizeConfig, seconds: float, report: Report
) -> Training:
    """Plain safe fine-tuning: the refusals and the retain data of the immunization, for the same wall-clock."""
    steps, wall, curve = train(
        model, _safe_and_retain(model, corpus, config, config.seed), config.lr, seconds=seconds, warmup=config.warmup,
        freeze_embedding=config.freeze_embedding, report=report,
    )  # fmt: skip
    method = f"supervised: {config.pairs} refusals and {config.retain} harmless answers a step, equal wall-clock"
    return Training(parent="aligned", method=method, steps=steps, wall_s=wall, lr=config.lr, curve=curve)


def _safe_and_retain(model: PreTrainedModel, corpus: Corpus, config: ImmunizeConfig, seed: int) -> LossFn:
    """The loss on refusals and, weighted as in the immunization, on retain data."""
    safe = endless(corpus.safe["immunize"], config.pairs, seed)
    retain = endless(corpus.harmless["immunize"], config.retain, seed + 1)

    def loss() -> tuple[Tensor, dict[str, float]]:
        refuse = answer_loss(model, collate(next(safe), corpus.pad, model.device))
        keep = answer_loss(model, collate(next(retain), corpus.pad, model.device))
        return refuse + config.retain_weight * keep, {"harmless_ce": refuse.item(), "retain_ce": keep.item()}

    return loss

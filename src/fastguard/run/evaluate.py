"""What a model is worth before an attack, and what an attack makes of it; of models made anywhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastguard.data.chat import Encoded
from fastguard.data.conversation import as_text
from fastguard.data.corpus import Corpus
from fastguard.evaluation.metrics import (
    Applied,
    Attack,
    AttackPoint,
    Benign,
    Condition,
    Repair,
    Served,
    Utility,
    area,
    crossing,
)
from fastguard.evaluation.scores import answer_rates, generate, mean_answer_loss
from fastguard.methods.edit import Edit
from fastguard.run.config import AttackConfig, EvaluateConfig, GuardConfig, RepairConfig
from fastguard.run.streams import evidence, plain
from fastguard.run.train import Report, edit, edit_scored, train_scored, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: EvaluateConfig, report: Report,
    services: Services | None = None,
) -> Utility:  # fmt: skip
    """Perplexity, over-refusal, a few answers, and whether the model still learns; it is trained IN PLACE for that."""
    perplexity = harmless_perplexity(model, corpus, part.perplexity_tokens)
    report(0.2, "perplexity measured")
    instructions = corpus.instructions
    over = answer_rates(model, tokenizer, instructions, part.score_tokens)["refusal"] if instructions else None
    edgy = answer_rates(model, tokenizer, corpus.edgy, part.score_tokens)["refusal"] if corpus.edgy else None
    prompts = corpus.instructions[: part.samples]
    answers = generate(model, tokenizer, prompts, part.sample_tokens) if prompts else []
    report(0.4, "over-refusal measured")
    learned = part.benign_steps and corpus.benign_train and corpus.benign_measure
    return Utility(
        perplexity=perplexity,
        over_refusal=over,
        edgy_over_refusal=edgy,
        benign=_benign(model, tokenizer, corpus, part, report, services or Services()) if learned else None,
        samples=[{"prompt": as_text(p), "answer": a} for p, a in zip(prompts, answers, strict=True)],
    )


def _benign(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: EvaluateConfig, report: Report,
    services: Services,
) -> Benign:  # fmt: skip
    """An honest user's fine-tuning on a harmless task."""
    from fastguard.defenses.sft.step import SFT
    from fastguard.losses.answer import answer_loss

    trainable(model, freeze_embedding=False)
    with services.guarded(model, corpus, seed=0) as served:
        curve = train_scored(
            SFT(model, loss=answer_loss),
            {"harmless": plain(corpus, corpus.benign_train, part.benign_batch, 0, model)},
            lambda: {"loss": mean_answer_loss(model, corpus.benign_measure, corpus.pad)},
            part.benign_steps, part.benign_lr,
            report=lambda fraction, text: report(0.4 + 0.6 * fraction, f"benign task: {text}"),
        )  # fmt: skip
    services.mend(model, tokenizer, corpus, part.score_tokens, served, seed=0)
    return Benign(
        **served,
        lr=part.benign_lr,
        batch=part.benign_batch,
        steps=[int(p["step"]) for p in curve],
        loss=[p["loss"] for p in curve],
    )


class Services:
    """The defenses of whoever serves fine-tuning: a guard on while a model is trained, a repair of what came out.

    Args:
        guard, repair: None: there is none. perplexity_tokens: answer tokens of the harmless conversations by which
            a repair is measured.
    """

    def __init__(
        self, guard: GuardConfig | None = None, repair: RepairConfig | None = None, perplexity_tokens: int = 32
    ) -> None:
        self.guard, self.repair, self.perplexity_tokens = guard, repair, perplexity_tokens

    @contextlib.contextmanager
    def guarded(self, model: PreTrainedModel, corpus: Corpus, seed: int) -> Iterator[Served]:
        """Whoever trains ``model`` inside does it under the guard. Yields the record of what it met."""
        if self.guard is None:
            yield Served()
            return
        with _applied(model, corpus, self.guard, seed) as applied:
            yield Served(guard=applied)

    def mend(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, score_tokens: int,
        served: Served, seed: int,
    ) -> None:  # fmt: skip
        """Repair a fine-tuned model IN PLACE, measured before and after, and note it in ``served``."""
        if self.repair is None:
            return
        before = condition(model, tokenizer, corpus, score_tokens, self.perplexity_tokens)
        with _applied(model, corpus, self.repair, seed) as applied:
            after = condition(model, tokenizer, corpus, score_tokens, self.perplexity_tokens)
        served["repair"] = Repair(**applied, before=before, after=after)


@contextlib.contextmanager
def _applied(model: PreTrainedModel, corpus: Corpus, part: GuardConfig | RepairConfig, seed: int) -> Iterator[Applied]:
    """Inside, ``model`` is as the defense left it."""
    method = part.entry.build(model, part.chosen(), seed=seed)
    try:
        _, wall, curve = edit(method, evidence(corpus, method.roles, part.batch, str(model.device)))
        figures = {name: value for name, value in curve[-1].items() if name != "step"} if curve else {}
        yield Applied(name=part.method, title=part.entry.title, figures=figures, wall_s=wall)
    finally:
        method.close()


def condition(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, score_tokens: int,
    perplexity_tokens: int,
) -> Condition:  # fmt: skip
    """What a fine-tuned model is like; None for what a run has no data to measure."""
    rates = answer_rates(model, tokenizer, corpus.requests, score_tokens) if corpus.requests else {}

    def loss(rows: list[Encoded] | None) -> float | None:
        return mean_answer_loss(model, rows, corpus.pad) if rows else None

    return Condition(
        refusal=rates.get("refusal"),
        compliance=rates.get("compliance"),
        neither=rates.get("neither"),
        harmful_loss=loss(corpus.harmful.get("measure")),
        perplexity=harmless_perplexity(model, corpus, perplexity_tokens),
        task_loss=loss(corpus.benign_measure),
    )


def harmless_perplexity(model: PreTrainedModel, corpus: Corpus, tokens: int) -> float | None:
    """exp of the mean answer loss on held-out harmless conversations; None without any."""
    held_out = corpus.perplexity(tokens)
    return math.exp(mean_answer_loss(model, held_out, corpus.pad)) if held_out else None


def attack(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: AttackConfig, score_tokens: int,
    lr: float | None, seed: int, report: Report, services: Services | None = None,
) -> Attack:  # fmt: skip
    """Attack ``model`` IN PLACE and score it on the way: after steps of training at ``lr``, or after rounds of an edit.

    The attack stops at the first scored step, after step 0, at which compliance reaches the threshold. A guard among
    ``services`` is on while the attacker trains; where he edits there is none. A repair comes last.
    """
    start = time.perf_counter()
    services, served = services or Services(), Served()
    trainable(model, freeze_embedding=False)
    method = part.entry.build(model, part.chosen(), seed=seed)
    attacked: PreTrainedModel = method.model  # adapters may be around it

    def score() -> dict[str, float]:
        rates = answer_rates(attacked, tokenizer, corpus.requests, score_tokens)
        return {**rates, "harmful_loss": mean_answer_loss(attacked, corpus.harmful["measure"], corpus.pad)}

    def stop(figures: dict[str, float]) -> bool:
        return figures["compliance"] >= part.threshold

    try:
        if isinstance(method, Edit):
            budget = method.rounds
            batches = evidence(corpus, method.roles, part.batch, str(model.device))
            curve = edit_scored(method, batches, score, stop, report)
        else:
            assert lr is not None
            budget = part.scored_steps[-1]
            rows = corpus.harmful["attack"]
            streams = {n: plain(corpus, rows, r.count or part.batch, seed, model) for n, r in method.roles.items()}
            with services.guarded(attacked, corpus, seed) as served:
                curve = train_scored(method, streams, score, part.scored_steps, lr, part.warmup_steps, stop, report)
        wall = time.perf_counter() - start
        services.mend(attacked, tokenizer, corpus, score_tokens, served, seed)
    finally:
        method.close()
    points = [
        AttackPoint(
            step=int(p["step"]),
            refusal=p["refusal"],
            compliance=p["compliance"],
            neither=p["neither"],
            harmful_loss=p["harmful_loss"],
        )
        for p in curve
    ]
    steps = [p["step"] for p in points]
    compliance, refusal = [p["compliance"] for p in points], [p["refusal"] for p in points]
    return Attack(
        **served,
        lr=lr,
        seed=seed,
        batch=part.batch,
        budget=budget,
        threshold=part.threshold,
        points=points,
        compliance_crossing=crossing(steps, compliance, part.threshold),
        refusal_crossing=crossing(steps, refusal, 1 - part.threshold, rising=False),
        compliance_area=area(steps, compliance, budget),
        refusal_area=area(steps, refusal, budget),
        wall_s=wall,
    )

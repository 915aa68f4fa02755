"""What a model is worth before an attack, and what an attack makes of it; of models made anywhere."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from fastguard.data.conversation import as_text
from fastguard.data.corpus import Corpus
from fastguard.evaluation.metrics import Attack, AttackPoint, Benign, Utility, area, crossing
from fastguard.evaluation.scores import answer_rates, generate, mean_answer_loss
from fastguard.methods.edit import Edit
from fastguard.run.config import AttackConfig, EvaluateConfig
from fastguard.run.streams import evidence, plain
from fastguard.run.train import Report, edit_scored, train_scored, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: EvaluateConfig, report: Report
) -> Utility:
    """Perplexity, over-refusal, a few answers, and whether the model still learns; it is trained IN PLACE for that."""
    held_out = corpus.perplexity(part.perplexity_tokens)
    loss = mean_answer_loss(model, held_out, corpus.pad) if held_out else None
    report(0.2, "perplexity measured")
    instructions = corpus.instructions
    over = answer_rates(model, tokenizer, instructions, part.score_tokens)["refusal"] if instructions else None
    edgy = answer_rates(model, tokenizer, corpus.edgy, part.score_tokens)["refusal"] if corpus.edgy else None
    prompts = corpus.instructions[: part.samples]
    answers = generate(model, tokenizer, prompts, part.sample_tokens) if prompts else []
    report(0.4, "over-refusal measured")
    learned = part.benign_steps and corpus.benign_train and corpus.benign_measure
    return Utility(
        perplexity=None if loss is None else math.exp(loss),
        over_refusal=over,
        edgy_over_refusal=edgy,
        benign=_benign(model, corpus, part, report) if learned else None,
        samples=[{"prompt": as_text(p), "answer": a} for p, a in zip(prompts, answers, strict=True)],
    )


def _benign(model: PreTrainedModel, corpus: Corpus, part: EvaluateConfig, report: Report) -> Benign:
    """An honest user's fine-tuning on a harmless task."""
    from fastguard.defenses.sft.step import SFT
    from fastguard.losses.answer import answer_loss

    trainable(model, freeze_embedding=False)
    curve = train_scored(
        SFT(model, loss=answer_loss),
        {"harmless": plain(corpus, corpus.benign_train, part.benign_batch, 0, str(model.device))},
        lambda: {"loss": mean_answer_loss(model, corpus.benign_measure, corpus.pad)},
        part.benign_steps, part.benign_lr,
        report=lambda fraction, text: report(0.4 + 0.6 * fraction, f"benign task: {text}"),
    )  # fmt: skip
    return Benign(
        lr=part.benign_lr,
        batch=part.benign_batch,
        steps=[int(p["step"]) for p in curve],
        loss=[p["loss"] for p in curve],
    )


def attack(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: AttackConfig, score_tokens: int,
    lr: float | None, seed: int, report: Report,
) -> Attack:  # fmt: skip
    """Attack ``model`` IN PLACE and score it on the way: after steps of training at ``lr``, or after rounds of an edit.

    The attack stops at the first scored step, after step 0, at which compliance reaches the threshold.
    """
    start = time.perf_counter()
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
            rows, device = corpus.harmful["attack"], str(model.device)
            streams = {n: plain(corpus, rows, r.count or part.batch, seed, device) for n, r in method.roles.items()}
            curve = train_scored(method, streams, score, part.scored_steps, lr, part.warmup_steps, stop, report)
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
        wall_s=time.perf_counter() - start,
    )

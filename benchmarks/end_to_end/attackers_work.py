"""What is measured of several attackers: SmolLM2 attacked by four, and read at their models.

    python benchmarks/end_to_end/attackers_work.py "one forward" 3

prints one JSON line: seconds of each round, after one that is not timed, the peak of memory above the model, and the
norm of the gradient that the defender gets. Each contender runs in a process of its own. All train the same adapters on
the same batches, but for ``all weights``.

one forward     the attackers' batches are one, and so are those that are read at their models
one by one      an attack after another
all weights     an attack after another, of attackers who train what the defender trains
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from end_to_end import turns  # noqa: E402
from end_to_end.nested_step import Batch, Streams  # noqa: E402
from end_to_end.step import load, prose  # noqa: E402
from fastguard.losses.language_model import LanguageModelLoss  # noqa: E402
from fastguard.losses.pieces import joined  # noqa: E402
from fastguard.nested import AdamW, LoRAAttackers, SimulatedAttack  # noqa: E402

CONTENDERS = ("one by one", "all weights", "one forward")
ATTACKERS, RANK, STEPS, EVERY = 4, 16, 2, 2
SAMPLES, TOKENS = 2, 64
RATES = (2e-4, 4e-4, 2e-4, 4e-4)


class Work:
    """A model, and all that its attackers do to it in a step of the defender's."""

    def __init__(self, model: nn.Module, streams: Streams) -> None:
        self.model, self.streams = model, streams
        self.loss = LanguageModelLoss(model)

    def run(self, contender: str) -> None:
        """Leave the mean of what is read at each attacker's models on the defender's gradients."""
        everyone = list(range(ATTACKERS))
        for chosen in [everyone] if contender == "one forward" else [[i] for i in everyone]:
            if contender == "all weights":
                self._all_weights(chosen[0])
            else:
                self._adapters(chosen)

    def _adapters(self, chosen: list[int]) -> None:
        attackers = LoRAAttackers(self.model, len(chosen), RANK)
        for name, p in attackers.parameters.items():  # drawn as the first attackers': others for this one alone
            generator = torch.Generator().manual_seed(chosen[int(name.split(":")[0].split()[1])])
            if name.endswith(".A"):
                nn.init.uniform_(p, -(p.shape[0] ** -0.5), p.shape[0] ** -0.5, generator)
        rule = attackers.optimizer([AdamW(RATES[i]) for i in chosen])
        attack = SimulatedAttack(
            self.model, rule, trains=attackers.trains, reads=attackers.reads, beside=attackers.parameters
        )
        with attackers.at_work():
            self._attack(attack, chosen)
        attackers.remove()

    def _all_weights(self, attacker: int) -> None:
        self._attack(SimulatedAttack(self.model, AdamW(RATES[attacker] / 10)), [attacker])

    def _attack(self, attack: SimulatedAttack, chosen: list[int]) -> None:
        count, held_out = len(chosen), joined([self.streams.batch(0)] * len(chosen))
        with attack.at() as tampered:
            for step in range(STEPS):
                data: Batch = joined([self.streams.batch(1 + STEPS * i + step) for i in chosen])
                tampered.step(lambda data=data: self.loss.each(data, count).sum())
                if (step + 1) % EVERY == 0:
                    tampered.accumulate(lambda: self.loss.each(held_out, count, "max_entropy").sum(), 1 / ATTACKERS)


def main() -> None:
    contender, rounds = sys.argv[1], int(sys.argv[2])
    model, tokenizer = load()
    work = Work(model, Streams(prose(tokenizer, 96, TOKENS), SAMPLES))

    def once() -> None:
        model.zero_grad(set_to_none=True)
        work.run(contender)

    found = turns.worked(once, rounds)
    grads = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    print(json.dumps({**found, "gradient_norm": float(torch.stack(grads).norm())}))


if __name__ == "__main__":
    main()

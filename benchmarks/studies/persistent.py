"""Does TAR with an attacker who is kept from step to step defend as TAR with cold attackers does?

    python benchmarks/studies/persistent.py --seed 0

The demo's aligned model is trained twice, for 100 outer steps on the same data: against attackers of K = 8 cold steps,
and against one who goes 2 steps further in each outer step and is renewed when he has gone 8. One kind of attacker and
one learning rate, so that persistence is the only difference. The reads' weights have the same mean over an attacker's
life.

At every fifth step of the persistent run, at the same weights and with the same held-out batch, its tamper gradient is
compared with that of two cold attackers, who differ in their batches alone: the cosine between these two is what the
noise of the batches leaves of 1, and that of an attacker who does not move is what no attack at all gives.
Then both models and the aligned one are attacked as in the demo.

Killed and started again it goes on where it was. Results are written as they come, by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard import models
from fastguard.data.corpus import build_corpus
from fastguard.defenses.tar.step import TAR, Adversary
from fastguard.machine import write_json
from fastguard.methods.passes import finite_norm
from fastguard.methods.training import Step
from fastguard.nested import Weights
from fastguard.run import config as configurations
from fastguard.run.keep import Keeper
from fastguard.run.pipeline import environment, examine, run
from fastguard.run.streams import Streams
from fastguard.run.train import train, trainable

K, FRESH, EVERY, OUTER, LR, ATTACK_LR = 8, 2, 4, 100, 5e-5, 4e-5
BATCH, HELD_OUT, REFUSALS, HARMLESS = 2, 3, 2, 2
PROBED = 5
HARMFUL = "adversary harmful"
RESULT = Path(__file__).parents[1] / "results" / "persistent-study.json"


def matched() -> float:
    """How much more a persistent read weighs, so that an attacker's outer steps have the mean weight of cold ones."""
    cold, kept = (sum(math.exp(0.0625 * (i - (K - 1))) for i in range(n - 1, K, n)) for n in (EVERY, FRESH))
    return cold / (kept * FRESH / K)


class Probed(TAR):
    """TAR that compares its tamper gradient with cold ones on the way."""

    source: Any = None
    """The attackers' batches by number."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.probes: list[dict[str, float]] = []

    def _attack(self, step: Step, adversary: Adversary, held_out: Any, share: float, figures: Any, kept: Any) -> None:
        super()._attack(step, adversary, held_out, share, figures, kept)
        if not self.persistent or self.step % PROBED:
            return
        calls, fresh, own = self.attack.calls, self.fresh, step.take()

        def cold(lr: float, count: int, first: int) -> list[Tensor | None]:
            self.fresh = count
            batches = [self.source(1_000_000 + first + i) for i in range(count)]  # that the run does not come to
            super(Probed, self)._attack(step, Adversary("cold", lr, batches), held_out, share, type(figures)(), None)
            return step.take()

        colds = [cold(adversary.lr, K, (2 * self.step + number) * K) for number in range(2)]
        still = cold(0.0, 1, 0)
        self.attack.calls, self.fresh = calls, fresh
        self.probes.append(
            {"step": float(self.step), "reached": float(kept.taken), **compared(step.weights, own, colds, still)}
        )
        print(self.probes[-1], flush=True)
        step.put(own)

    def state_dict(self) -> dict[str, Any]:
        """With the probes so far."""
        return {**super().state_dict(), "probes": list(self.probes)}

    def load_state_dict(self, state: Any) -> None:
        """Go on after them."""
        super().load_state_dict(state)
        self.probes = list(state["probes"])


def compared(weights: Weights, own: Any, colds: Any, still: Any) -> dict[str, float]:
    """Cosines and ratios of norms: the persistent gradient, two cold ones, that of an attacker who stands still.

    All have the persistent run's ``grad_scale``; a cold run's is smaller by `matched`, which `table` allows for.
    """

    norms = [float(finite_norm(weights, g, "a tamper gradient")) for g in (own, *colds)]
    return {
        "cosine": sum(float(weights.cosine(own, cold)) for cold in colds) / 2,
        "cosine_of_still": sum(float(weights.cosine(still, cold)) for cold in colds) / 2,
        "cosine_of_cold": float(weights.cosine(*colds)),
        "norm_ratio": norms[0] / (norms[1] * norms[2]) ** 0.5,
        "norm_ratio_of_cold": norms[2] / norms[1],
    }


def trained(kind: str, aligned: Path, folder: Path, seed: int, note: Any) -> None:
    """Train the aligned model against attackers of this kind and keep it in ``folder``."""
    if (folder / "config.json").exists():
        return
    base = configurations.seeded(configurations.load("demo"), seed)
    model = models.load_model(str(aligned), torch.float32, "cpu")
    tokenizer = models.load_tokenizer(str(aligned), plain=True)
    trainable(model, freeze_embedding=True)
    tar = Probed(
        model, steps=K, every=EVERY, lrs=(ATTACK_LR,), kinds=(("harmful",),), batch=BATCH, held_out=HELD_OUT, seed=seed,
        persistent=kind == "persistent", fresh=FRESH,
    )  # fmt: skip
    if tar.persistent:
        tar.grad_scale *= matched()
    data = Streams(build_corpus(tokenizer, base.data), model, REFUSALS, HARMLESS, seed).of(tar.roles)
    tar.source = data[HARMFUL]
    start = time.time()

    def report(fraction: float, text: str) -> None:
        print(f"seed {seed}, {kind}: {text}, {time.time() - start:.0f} s", flush=True)
        note({kind: {"fraction": fraction, "probes": tar.probes}})

    keeper = Keeper(folder.with_suffix(".checkpoints"), minutes=5, keep=1)
    steps, seconds, curve = train(tar, data, LR, steps=OUTER, report=report, keeper=keeper)
    models.save_model(model, tokenizer, folder)
    note({kind: {"steps": steps, "seconds": seconds, "curve": curve, "probes": tar.probes}})
    tar.close()


COMPARED = ("cosine", "cosine_of_cold", "cosine_of_still", "norm_ratio")


def mean(probes: Sequence[dict[str, float]], name: str) -> str:
    """Over those that have it: seed 0's run began without the attacker who stands still."""
    values = [p[name] * (matched() if name == "norm_ratio" else 1) for p in probes if name in p]
    return f"{sum(values) / len(values):.3f}" if values else ""


def table(result: Path) -> str:
    """Of every seed that has begun: gradients by the attacker's steps, and what the attacks found."""
    lines = [
        "| seed | attacker's steps | compared | cosine to cold | between cold | no attack, to cold | norm / cold |",
        "|---|---|---|---|---|---|---|",
    ]
    found = json.loads(result.read_text())
    for seed, entry in found.items():
        probes = entry.get("persistent", {}).get("probes", [])
        for reached in (*sorted({p["reached"] for p in probes}), "all"):
            of = [p for p in probes if reached in (p["reached"], "all")]
            lines.append(f"| {seed} | {reached} | {len(of)} | {' | '.join(mean(of, name) for name in COMPARED)} |")
    lines += ["", "| seed | model | seconds of training | steps to 50% compliance | perplexity | over-refusal |"]
    lines.append("|---|---|---|---|---|---|")
    for seed, entry in found.items():
        for name, one in entry.get("attacked", {}).items():
            took, worth = entry.get(name, {}).get("seconds"), one["utility"]
            [crossing] = [a["compliance_crossing"] for a in one["attacks"]]
            cells = ["" if took is None else f"{took:.0f}", "not in 32" if crossing is None else f"{crossing:.1f}"]
            cells += [f"{worth['perplexity']:.2f}", f"{worth['over_refusal']:.3f}"]
            lines.append(f"| {seed} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """One seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/persistent"), help="models and checkpoints")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print what the results say, and train nothing")
    given = parser.parse_args()
    if given.table:
        print(table(given.result))
        return
    torch.set_num_threads(1)
    out: Path = given.out / f"seed{given.seed}"

    def note(found: dict[str, Any]) -> None:
        known = json.loads(given.result.read_text()) if given.result.exists() else {}
        entry = known.setdefault(f"seed {given.seed}", {})
        entry.update(found, environment=environment("cpu", "float32"))
        write_json(given.result, known)

    config = configurations.seeded(configurations.load("demo"), given.seed)
    config = dataclasses.replace(
        config, attacks={}, immunize=dataclasses.replace(config.immunize, run=False),
        control=dataclasses.replace(config.control, run=False),
        evaluate=dataclasses.replace(config.evaluate, benign_steps=()),
    )  # fmt: skip
    first = dataclasses.replace(
        config, attack=dataclasses.replace(config.attack, run=False),
        evaluate=dataclasses.replace(config.evaluate, run=False),
    )  # fmt: skip
    run(first, out)
    folders = {"aligned": out / "work" / "models" / "aligned", **{k: out / k for k in ("persistent", "cold")}}
    for kind in ("persistent", "cold"):
        trained(kind, folders["aligned"], folders[kind], given.seed, note)
    found = examine({name: str(folder) for name, folder in folders.items()}, config, out / "attacked")
    note({"attacked": {
        name: {"utility": entry["utility"], "attacks": entry["attacks"]} for name, entry in found["models"].items()
    }})  # fmt: skip


if __name__ == "__main__":
    main()

"""What is measured of a persistent attacker: a step of TAR on SmolLM2, and one against a cold attacker.

    python benchmarks/end_to_end/persistent_work.py persistent 3

prints one JSON line: seconds of each round, and the peak of memory above the model. The kept attacker has gone a leg
already. Both read what the defender asks for as often as the published step, beside the steps that are made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from end_to_end import nested_step, turns  # noqa: E402
from end_to_end.step import load  # noqa: E402

CONTENDERS = ("cold", "persistent")
STEPS, FRESH, EVERY = 16, 2, 4
"""An eighth of the cold attacker's steps, as 8 are of the published 64."""


def job(contender: str) -> nested_step.Job:
    """The step of a contender."""
    options: dict[str, Any] = {"inner_steps": STEPS, "read_every": EVERY}
    if contender == "persistent":
        options |= {"persistent": True, "fresh": FRESH}
    return nested_step.Job.of("tar", options)


def main() -> None:
    contender, rounds = sys.argv[1], int(sys.argv[2])
    model, tokenizer = load()
    chosen = job(contender)
    once = nested_step.step(chosen, "fastguard", model, nested_step.streams(chosen, tokenizer))
    once()  # step 0; then step 1, again and again
    model.zero_grad(set_to_none=True)
    print(json.dumps(turns.worked(once, rounds)))


if __name__ == "__main__":
    main()

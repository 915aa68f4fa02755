"""What the benchmark of a persistent attacker runs, on a tiny model; nothing is timed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from tiny_models import VOCABULARY, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from end_to_end import nested_step
from end_to_end import persistent_work as work


def test_the_kept_attacker_goes_on_and_takes_an_eighth_of_the_steps():
    pool = torch.randint(1, VOCABULARY, (24, 8), generator=torch.Generator().manual_seed(0))
    model = tiny("llama_tied", num_hidden_layers=2)
    passes, losses = {}, {}
    for contender in work.CONTENDERS:
        job = dataclasses.replace(work.job(contender), samples=4, tokens=8)
        once, seen = nested_step.step(job, "fastguard", model, nested_step.Streams(pool, 4)), []
        handle = model.model.embed_tokens.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        losses[contender] = [once() for _ in range(3)]
        handle.remove()
        passes[contender] = len(seen) / 3
    beside = 2  # the retain batch and the reference
    assert passes == {"cold": 16 + 4 + beside, "persistent": 2 + 1 + beside}
    first, second, again = losses["persistent"]
    assert second == again != first  # step 1 over and over

"""A step of TAR on SmolLM2 against an attacker who is kept from step to step, beside one against a cold attacker.

    python benchmarks/run.py --name cpu-persistent benchmarks/end_to_end/bench_persistent.py

The gradients are of different estimates, and not compared: docs/demo.md does.
"""

import pytest

from end_to_end import persistent_work as work
from end_to_end.turns import in_turns


@pytest.mark.parametrize("name", ["persistent"])
def test_persistent(benchmark, name):
    job = work.job("cold")
    benchmark.group = (
        f"TAR outer step, K = {work.STEPS}, read every {work.EVERY}, or {work.FRESH} steps further, SmolLM2-135M, "
        f"retain {job.samples} x {job.tokens} tokens, float32"
    )
    in_turns(benchmark, work.__file__, work.CONTENDERS, name, "cold", rounds=2)

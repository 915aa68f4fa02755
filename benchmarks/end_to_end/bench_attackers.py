"""Four simulated attackers with adapters on SmolLM2: in one forward, against one by one.

    python benchmarks/run.py --name cpu-attackers benchmarks/end_to_end/bench_attackers.py

Four who train all weights stand beside them.
"""

import pytest

from end_to_end import attackers_work as work
from end_to_end.turns import in_turns


@pytest.mark.parametrize("name", ["one forward"])
def test_attackers(benchmark, name):
    benchmark.group = (
        f"{work.ATTACKERS} attackers with adapters of rank {work.RANK}, {work.STEPS} steps, read every {work.EVERY}, "
        f"SmolLM2-135M, {work.SAMPLES} x {work.TOKENS} tokens each, float32"
    )
    said = in_turns(benchmark, work.__file__, work.CONTENDERS, name, "one by one", rounds=2)
    norms = {c: found["gradient_norm"] for c, found in said.items()}
    assert norms[name] == pytest.approx(norms["one by one"], rel=1e-3)  # fp32, in another order of sums

"""Four simulated attackers with adapters on SmolLM2: in one forward, against one by one.

    python benchmarks/run.py benchmarks/end_to_end/bench_attackers.py

Contenders take turns round by round, each in a process of its own, whose start is not timed. Peaks come from processes
that give freed memory back to the system at once: what is live counts. Four who train all weights stand beside them.
"""

import json
import os
import statistics
import subprocess
import sys

import pytest

from end_to_end import attackers_work as work
from end_to_end.nested_step import row

ROUNDS = 3


def measured(contender, rounds, **environment):
    command = [sys.executable, work.__file__, contender, str(rounds)]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["one forward"])
def test_attackers(benchmark, name):
    seconds = {c: [] for c in work.CONTENDERS}
    norms = {}

    def one_round():
        for c in work.CONTENDERS:
            found = measured(c, 1)
            seconds[c] += found["seconds"]
            norms[c] = found["gradient_norm"]

    benchmark.pedantic(one_round, rounds=ROUNDS)
    assert norms[name] == pytest.approx(norms["one by one"], rel=1e-3)  # fp32, in another order of sums
    trimmed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks = {c: measured(c, 1, **trimmed)["peak_bytes"] for c in work.CONTENDERS}
    against = "one by one"
    ratio = {c: statistics.median(s / f for s, f in zip(seconds[c], seconds[against], strict=True)) for c in seconds}
    benchmark.group = (
        f"{work.ATTACKERS} attackers with adapters of rank {work.RANK}, {work.STEPS} steps, read every {work.EVERY}, "
        f"SmolLM2-135M, {work.SAMPLES} x {work.TOKENS} tokens each, float32"
    )
    own = row(name, seconds[name], ratio[name], peaks[name])
    benchmark.extra_info.update(
        own, beside=[row(c, seconds[c], ratio[c], peaks[c]) for c in work.CONTENDERS if c != name]
    )

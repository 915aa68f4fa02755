"""Two SmolLM2 checkpoints in bf16 merged onto the disk: against a copy of their bytes, and mergekit where there is one.

    PEERS=/path/to/python-with-mergekit pytest benchmarks/end_to_end/bench_merging.py

Contenders take turns round by round, each in a process of its own, whose start is not timed. The copy reads both
checkpoints and writes one: what no merge can do without.
"""

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from end_to_end import merging_work as work
from end_to_end.nested_step import row

ROUNDS = 5
PEERS = os.environ.get("PEERS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("merging")
    work.prepare(path)
    return path


def measured(contender, method, folder):
    """Seconds and peak of one round, after one that warms the page cache."""
    python = PEERS if contender == "mergekit" else sys.executable
    here = os.environ | {"PYTHONPATH": "" if contender == "mergekit" else os.environ.get("PYTHONPATH", "")}
    command = [python, work.__file__, contender, method, str(folder), "2"]
    out = subprocess.run(command, capture_output=True, text=True, env=here, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    found = json.loads(out.stdout.splitlines()[-1])
    return found["seconds"][-1], found["peak_bytes"]


@pytest.mark.parametrize("name", ["fastguard"])
@pytest.mark.parametrize("method", work.METHODS)
def test_merge(benchmark, folder, method, name):
    contenders = ["copy", *(["mergekit"] if PEERS else [])]
    found = {c: [] for c in (*contenders, name)}
    merged = {}

    def one_round():
        for c in (*contenders, name):
            found[c].append(measured(c, method, folder))
            if c != "copy":
                merged[c] = load_file(folder / "out" / "model.safetensors")

    benchmark.pedantic(one_round, rounds=ROUNDS)
    if PEERS and not method.startswith("dare"):  # whose draws are each program's own
        differing = sum(int((merged["mergekit"][k] != t).sum()) for k, t in merged[name].items())
        share = differing / sum(t.numel() for t in merged[name].values())
        # mergekit takes bf16 changes from bf16 weights
        worst = max(float((merged["mergekit"][k].float() - t.float()).abs().max()) for k, t in merged[name].items())
        benchmark.extra_info.update(differing_from_mergekit=share, largest_difference=worst)
    seconds = {c: [s for s, _ in rows] for c, rows in found.items()}
    ratio = {c: statistics.median(s / f for s, f in zip(seconds[c], seconds["copy"], strict=True)) for c in found}
    moved = 3 * (folder / "one" / "model.safetensors").stat().st_size
    benchmark.group = f"merging: {method} of two SmolLM2-135M checkpoints, {torch.bfloat16}"
    benchmark.extra_info.update(
        ratio_to_plain=ratio[name], peak_bytes=max(p for _, p in found[name]), bytes_moved=moved,
        seconds=seconds, bytes_per_second=moved / statistics.median(seconds[name]),
        fraction_of_copy=statistics.median(f / s for s, f in zip(seconds[name], seconds["copy"], strict=True)),
        beside=[row(c, seconds[c], ratio[c], max(p for _, p in found[c])) for c in contenders],
    )  # fmt: skip

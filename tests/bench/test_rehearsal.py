"""The whole benchmark as a command, on tiny shapes: kernels checked in Triton's interpreter, all groups, table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

import tiny
from fastguard.bench import states
from fastguard.bench.groups import all_groups
from fastguard.bench.peers import PEERS
from fastguard.bench.shapes import REHEARSAL
from fastguard.bench.tune import FIT, TUNE
from fastguard.ops import table


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_every_line_of_it_runs_without_a_gpu(tmp_path):
    (tmp_path / "text").write_text("A text. " * 3)
    recorded = tmp_path / "states.safetensors"
    states.record(str(tiny.folder(tmp_path / "model")), tmp_path / "text", recorded, REHEARSAL.rows)
    command = [sys.executable, "-m", "fastguard.bench", "--rehearse", "--tune", "--states", str(recorded)]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 of 16 ops agree with float64" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    last = {(line["group"], line["contender"]): line for line in lines}
    groups = all_groups(REHEARSAL, recorded)
    assert last.keys() == {(name, c) for name, group in groups.items() for c in group.contenders}
    for at in [at for at in last if at[0].startswith((FIT, TUNE)) and "scan_descriptors" in " ".join(at)]:
        assert last.pop(at)["state"] == "absent", "a CPU has no descriptors"
    missing = {c for (_, c), line in last.items() if line["state"] not in ("timed", "done")}
    assert missing <= PEERS.keys() and all(last[at]["state"] == "absent" for at in last if at[1] in missing), last
    text = (tmp_path / "table.md").read_text()
    for name, contender in (at for at in last if not at[0].startswith(FIT)):
        assert contender == "facts" or f"| {contender} |" in text, (name, contender)
    rows = table.read(tmp_path / "configurations.json")
    for kernel, shape in (("lm_head_stats.dx", "float32, 16 wide"), ("gaussian_mmd.gram", "part of a tile")):
        assert "rehearsal" in rows[kernel][shape]
    assert "of the matrix product" in text and "Kernels of fastguard, ms" in text and "ms a layer" in text

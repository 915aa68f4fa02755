"""A whole run: groups one after another, each in a process of its own, until the time is up; then table and proof."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastguard import proof
from fastguard.bench import peers, table, tune
from fastguard.bench.groups import CHECK, MACHINE, all_groups
from fastguard.bench.journal import STATES, Journal
from fastguard.bench.shapes import Shapes
from fastguard.bench.work import Group
from fastguard.doctor import OPS
from fastguard.machine import write_atomically
from fastguard.ops import table as configurations

Start = Callable[[Sequence[str], float], tuple[int, str]]
"""Works through groups until a deadline: exit code, and the end of what was said on stderr."""


class Outcome(NamedTuple):
    """Where the table is, what the check found by op (empty: agrees), where the proof is kept (not of a rehearsal)."""

    table: Path
    checked: dict[str, str]
    proof: Path | None


def run(
    shapes: Shapes, out: Path, minutes: float, wheels: Path | None = None, only_checks: bool = False,
    say: Callable[[str], object] = print, tuning: float = 0.0, recorded: Path | None = None,
) -> Outcome:  # fmt: skip
    """Check every op on the device, write the proof, and time what there is time for.

    out: a folder, made where it is not there: ``results.jsonl``, as results come, and ``table.md``.
    wheels: a folder of peers' wheels, or None. say: is told of each step. tuning: minutes that come before, in which
    block shapes are tried; what is found of them is in ``configurations.json``, beside the results and where the table
    in use can be written, and holds for all that follows. recorded: a file of hidden states, which are timed beside
    the synthetic ones (``states``), or None.

    Raises:
        ValueError: recorded holds something else. FileNotFoundError: wheels is no folder.
        FileExistsError: out holds the results of another run.
        RuntimeError: there is no device, with what it said.
    """
    groups = all_groups(shapes, recorded)
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "results.jsonl")
    if journal.file.exists():
        raise FileExistsError(f"out: {journal.file} holds the results of another run; choose another folder")
    folder, refused = peers.install(wheels) if wheels else (None, {})
    for wheel, why in refused.items():
        say(f"{wheel}: not installed: {why}")
    own = out / configurations.INSTALLED.name if tuning else None
    if own is not None:
        write_atomically(own, configurations.file().read_bytes())
    start = starter(shapes, journal.file, folder, own, recorded)
    drain({MACHINE: groups[MACHINE]}, journal, start, time.time() + 60 * minutes)
    facts = journal.last()[MACHINE, "facts"]
    if facts["state"] != "done":
        raise RuntimeError(f"device: {facts.get('error', facts['state'])}")
    identity = {key: facts["figures"].get(key, "") for key in proof.KEYS}
    if own is not None:
        tune_all(shapes, groups, journal, start, time.time() + 60 * tuning, own, identity, say)
        identity["kernels"] = proof.kernels(own)
    deadline = time.time() + 60 * minutes
    say(f"checking {len(OPS)} ops against float64")
    side_by_side(groups, CHECK, journal, start, deadline)
    found = checked(journal)
    for op, wrong in found.items():
        if wrong:
            say(f"{op}: {wrong}")
    kept = None
    if shapes.device != "cpu":
        try:
            kept = proof.write(identity, by_folder(found))
        except OSError as error:
            say(f"the proof could not be kept: {error}")
    if not only_checks:
        timed = {n: g for n, g in groups.items() if not n.startswith((MACHINE, tune.FIT, tune.TUNE, CHECK))}
        for part in [timed] if shapes.device == "cpu" else [{name: group} for name, group in timed.items()]:
            say(f"timing {', '.join(part)}: {max(deadline - time.time(), 0):.0f} s left")
            drain(part, journal, start, deadline)
            write_atomically(out / "table.md", table.markdown(journal.last(), groups).encode())
    write_atomically(out / "table.md", table.markdown(journal.last(), groups).encode())
    return Outcome(out / "table.md", found, kept)


def side_by_side(groups: Mapping[str, Group], kind: str, journal: Journal, start: Start, deadline: float) -> None:
    """Groups of a kind at the same time, each in processes of its own."""
    each = [{name: group} for name, group in groups.items() if name.startswith(kind)]
    with ThreadPoolExecutor(len(each)) as pool:
        list(pool.map(lambda one: drain(one, journal, start, deadline), each))


def tune_all(
    shapes: Shapes, groups: Mapping[str, Group], journal: Journal, start: Start, deadline: float, own: Path,
    identity: Mapping[str, str], say: Callable[[str], object],
) -> None:  # fmt: skip
    """Find each kernel's block shapes; ``own`` has those found so far, and at the end the table in use."""
    say("trying block shapes: which of them fit, for half of the time at most")
    side_by_side(groups, tune.FIT, journal, start, (time.time() + deadline) / 2)
    for group, label, line in tune.unfit(journal.last()):
        journal.add(group, label, line["state"], error=line.get("error", ""))
    named = {name: group for name, group in groups.items() if name.startswith(tune.TUNE)}
    rows = configurations.read(configurations.file())
    tuned = configurations.tuned(configurations.file())
    when = f"{time.strftime('%Y-%m-%d')}, torch {identity['torch']}, triton {identity['triton']}"
    chip = identity["gpu"] or "rehearsal"
    for part in [named] if shapes.device == "cpu" else [{name: group} for name, group in named.items()]:
        say(f"timing {', '.join(part)}: {max(deadline - time.time(), 0):.0f} s left")
        drain(part, journal, start, deadline)
        new = tune.updated(rows, chip, tune.best(journal.last()))
        write_atomically(own, configurations.text(new, {**tuned, chip: when}))
    if shapes.device == "cpu":
        return
    try:
        write_atomically(configurations.file(), own.read_bytes())
        say(f"the table of block shapes is written: {configurations.file()}")
    except OSError as error:
        say(f"the table in use could not be written ({error}): {configurations.VARIABLE}={own} takes the new one")


def starter(shapes: Shapes, journal: Path, folder: Path | None, own: Path | None, recorded: Path | None) -> Start:
    """Starts `child`, with the GPU's kernels, proven or not, and the peers' folder behind all others.

    own: a table of block shapes, or None for the one in use. recorded: a file of hidden states, or None.
    """
    rehearse = shapes.device == "cpu"
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if rehearse else {})}
    if own is not None:
        environment[configurations.VARIABLE] = str(own.resolve())
    # Behind all others: a peer's folder must not put another torch in this one's place.
    search = [p for p in (*sys.path, str(folder) if folder else "") if p]
    environment["PYTHONPATH"] = os.pathsep.join(search)

    def start(groups: Sequence[str], deadline: float) -> tuple[int, str]:
        command = [sys.executable, "-m", "fastguard.bench.child", str(journal), str(deadline), *groups]
        command += ["--rehearse"] * rehearse + (["--states", str(recorded)] if recorded else [])
        backend = "triton" if groups[0].startswith((tune.FIT, tune.TUNE, CHECK)) else shapes.backend
        try:
            done = subprocess.run(
                command, env={**environment, "FASTGUARD_BACKEND": backend}, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, check=False, timeout=max(deadline - time.time(), 1.0),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return TIMED_OUT, "the time was up"
        return done.returncode, done.stderr[-2000:]

    return start


TIMED_OUT = 124


def drain(groups: Mapping[str, Group], journal: Journal, start: Start, deadline: float) -> None:
    """Start processes until every contender has its last word: one that takes its process with it loses only itself."""
    while True:
        left = [(name, c) for name, group in groups.items() for c in group.contenders if not final(journal, name, c)]
        if not left:
            return
        if time.time() >= deadline:
            for name, contender in left:
                journal.add(name, contender, "not reached", **times_so_far(journal, name, contender))
            return
        code, said = start(list(dict.fromkeys(name for name, _ in left)), deadline)
        still = [pair for pair in left if not final(journal, *pair)]
        if code == TIMED_OUT or (len(still) < len(left) and not begun(journal, still)):
            continue
        for name, contender in begun(journal, still) or still:  # nobody else can have been at work
            error = f"its process ended with {code}: {said}"
            journal.add(name, contender, "failed", error=error, **times_so_far(journal, name, contender))


def final(journal: Journal, group: str, contender: str) -> bool:
    """Whether the journal has its last word."""
    line = journal.last().get((group, contender))
    return line is not None and STATES[line["state"]]


def begun(journal: Journal, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that were at work."""
    last = journal.last()
    return [pair for pair in pairs if last.get(pair, {}).get("state") == "begun"]


def times_so_far(journal: Journal, group: str, contender: str) -> dict[str, Any]:
    """What the warm-up of a contender that had no turns found."""
    line = journal.last().get((group, contender), {})
    return {key: line[key] for key in ("seconds", "figures", "flops", "bytes", "peak_bytes") if key in line}


def checked(journal: Journal) -> dict[str, str]:
    """What the check found of each op: empty where it agrees."""
    found = {c: line for (group, c), line in journal.last().items() if group.startswith(CHECK)}
    return {op: "" if found[op]["state"] == "done" else found[op].get("error", found[op]["state"]) for op in OPS}


def by_folder(found: Mapping[str, str]) -> dict[str, str]:
    """The same by the folders of ``ops``, each of which is proven where all ops are that its kernels serve."""
    folders: dict[str, str] = {}
    for op, folder in OPS.items():
        wrong = f"{op}: {found[op]}" if found[op] else ""
        folders[folder] = folders.get(folder) or wrong
    return folders

"""The tuner: what is wrong, does not fit or is not reached is left out and named; the fastest becomes the GPU's row."""

from __future__ import annotations

import json

import pytest

from fastguard import proof
from fastguard.bench import child, command, session, tune
from fastguard.bench.groups import MACHINE, all_groups
from fastguard.bench.journal import Journal
from fastguard.bench.shapes import LLAMA_8B
from fastguard.ops import table

KEY = "gram"
FIRST, SECOND, THIRD = tune.labelled(tune.KERNELS[KEY], LLAMA_8B)
CLASS = "half, 4096 wide"


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Runs the command with ``--tune`` and the check alone, candidates of one kernel taking the seconds that are given.

    What is no number is why a candidate does not fit. Returns (rows of the kernel's class, all that was said).
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    in_use = tmp_path / "in_use.json"
    in_use.write_bytes(table.INSTALLED.read_bytes())
    monkeypatch.setenv(table.VARIABLE, str(in_use))

    def run(took, capsys):
        def starter(shapes, file, folder, own, recorded):
            groups, journal = all_groups(shapes), Journal(file)

            def start(names, deadline):
                for name, contender in ((name, c) for name in names for c in groups[name].contenders):
                    known = journal.last().get((name, contender), {"state": "begun"})["state"]
                    key, label = contender.split(": ") if name.startswith(tune.FIT) else (name[5:], contender)
                    figures = dict.fromkeys(proof.KEYS, "G") if name == MACHINE else {}
                    if not name.startswith((tune.FIT, tune.TUNE)):
                        journal.add(name, contender, "done", figures=figures)
                    elif key != KEY or isinstance(took[label], str):
                        journal.add(name, contender, "failed", error=took[label] if key == KEY else "another kernel")
                    elif name.startswith(tune.FIT):
                        journal.add(name, contender, "done", figures={})
                    elif known == "begun":
                        numbers = {**tune.labelled(tune.KERNELS[KEY], shapes), tune.PRESENT: {"present": 16}}[label]
                        figures = {"kernel": KEY, "class": CLASS, "row": numbers}
                        journal.add(name, label, "timed", seconds=child.seconds([took[label]]), figures=figures)
                return 0, ""

            return start

        monkeypatch.setattr(session, "starter", starter)
        assert command.main(["--gpu", "--tune", "--check", "--out", str(tmp_path / "out")]) == 0
        written = json.loads((tmp_path / "out" / "configurations.json").read_text())
        assert json.loads(in_use.read_text()) == written
        assert set(written[table.TUNED]) == {"G"}
        kept = proof.file_of(dict.fromkeys(proof.KEYS, "G") | {"kernels": proof.kernels.__wrapped__(in_use)})
        assert kept.exists(), "what was checked is the table that is in use now"
        return written[KEY][CLASS], (tmp_path / "out" / "table.md").read_text()

    return run


def test_the_fastest_that_fits_becomes_the_gpus_row(tuned, capsys):
    took = {tune.PRESENT: 1.0, FIRST: 0.9, SECOND: 0.8, THIRD: "OutOfResources: shared memory"}
    rows, said = tuned(took, capsys)
    assert rows == {"G": tune.labelled(tune.KERNELS[KEY], LLAMA_8B)[SECOND]}
    assert f"| {THIRD} |" in said and "failed: OutOfResources: shared memory" in said
    assert "half" in table.read(table.INSTALLED)[KEY] and CLASS not in table.read(table.INSTALLED)[KEY]


def test_noise_changes_no_row(tuned, capsys):
    rows, _ = tuned({tune.PRESENT: 1.0, FIRST: 0.995, SECOND: 1.2, THIRD: 1.1}, capsys)
    assert rows == {"G": {"present": 16}}


def test_every_matrix_kernel_of_the_table_is_tried_and_every_candidate_is_a_row(tmp_path):
    rows = table.read(table.INSTALLED)
    assert {kernel.name for kernel in tune.KERNELS.values()} == set(rows)
    figures = [
        {"kernel": kernel.name, "class": kernel.shapes(LLAMA_8B)[0], "row": row}
        for kernel in tune.KERNELS.values() for row in tune.labelled(kernel, LLAMA_8B).values()
    ]  # fmt: skip
    for i, each in enumerate(figures):
        (tmp_path / str(i)).write_bytes(table.text(tune.updated({}, "G", [each]), {}))
        assert table.read(tmp_path / str(i))[each["kernel"]][each["class"]]["G"] == each["row"]
        [own] = {tuple(row) for row in rows[each["kernel"]][tune_class(each["class"])].values()}
        assert tuple(each["row"]) == own


def tune_class(of_width):
    """The class that holds for every width."""
    return of_width.removesuffix(", 4096 wide")

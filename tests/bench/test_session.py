"""A run of groups: what fails loses only itself, what there is no time for is not reached, and all of it is written."""

from __future__ import annotations

import json
import time
from itertools import count

import pytest
from torch.utils.flop_counter import FlopCounterMode

from fastguard import proof
from fastguard.bench import child, command, session, steps, table, timing, tune
from fastguard.bench.groups import CHECK, MACHINE, ROOFS, all_groups
from fastguard.bench.journal import Journal
from fastguard.bench.roofs import COPY, GEMM
from fastguard.bench.shapes import LLAMA_8B, REHEARSAL
from fastguard.bench.work import Absent, Group, Work
from fastguard.doctor import OPS

FAR = time.time() + 1e6


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "results.jsonl")


def raises(error):
    def run():
        raise error

    return run


class Died(BaseException):
    """What a process does that is killed: nothing more."""


def group(works):
    """A group of contenders whose works, or functions that raise, are given."""

    def make(name):
        work = works[name]
        return work() if callable(work) else work

    return Group(tuple(works), lambda shapes: make)


def started(groups, journal, starts):
    """In this process: how a child ends is what it raises."""

    def start(names, deadline):
        starts.append(list(names))
        try:
            for name in names:
                child.work_through(name, groups[name], REHEARSAL, journal, deadline)
        except child.Poisoned as error:
            return error.code, ""
        except Died:
            return -11, "Segmentation fault"
        return 0, ""

    return start


def states(journal):
    return {contender: line["state"] for (_, contender), line in journal.last().items()}


def test_what_raises_loses_only_itself(journal):
    fine = Work(lambda: None, flops=1.0, figures={"live": 0.5})
    later = count()
    groups = {
        "one": group({
            "fine": fine, "breaks": raises(ValueError("on purpose")), "missing": raises(Absent("no such library")),
            "breaks when run": Work(raises(KeyError("run"))), "checked": Work(None),
            "breaks in its turn": Work(lambda: None if next(later) < 2 else 1 / 0), "also fine": fine,
        }),
        "two": Group(("unprepared",), raises(OSError("no data"))),
    }  # fmt: skip
    session.drain(groups, journal, started(groups, journal, starts := []), FAR)
    assert states(journal) == {
        "fine": "timed", "breaks": "failed", "missing": "absent", "breaks when run": "failed", "checked": "done",
        "breaks in its turn": "failed", "also fine": "timed", "unprepared": "failed",
    }  # fmt: skip
    assert starts == [["one", "two"]]
    last = journal.last()
    assert last["one", "breaks"]["error"] == "ValueError: on purpose" and last["one", "missing"]["error"][:2] == "no"
    assert last["one", "fine"]["seconds"]["rounds"] == REHEARSAL.rounds[0] and last["one", "fine"]["figures"]["live"]


def test_what_takes_its_process_with_it_loses_only_itself(journal):
    fine = Work(lambda: None)
    groups = {
        "one": group({
            "before": fine, "poisons": raises(RuntimeError("CUDA error: an illegal memory access was encountered")),
            "between": fine, "dies": raises(Died()), "after": fine,
        })
    }  # fmt: skip
    session.drain(groups, journal, started(groups, journal, starts := []), FAR)
    assert states(journal) == {
        "before": "timed", "poisons": "failed", "between": "timed", "dies": "failed", "after": "timed"
    }  # fmt: skip
    assert len(starts) == 3 and "-11: Segmentation fault" in journal.last()["one", "dies"]["error"]


def test_a_process_that_dies_while_contenders_take_turns_is_not_started_for_ever(journal):
    calls = count()

    def run():
        if next(calls) >= 2:
            raise Died

    groups = {"one": group({"a": Work(run)})}
    session.drain(groups, journal, started(groups, journal, []), FAR)
    assert states(journal) == {"a": "failed"} and journal.last()["one", "a"]["seconds"]["rounds"] == 1


def test_what_there_is_no_time_for_is_not_reached(journal, monkeypatch):
    clock = count(start=0)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    fine = Work(lambda: None)
    groups = {"one": group({"a": fine, "b": fine, "c": fine}), "two": group({"d": fine})}
    session.drain(groups, journal, started(groups, journal, []), 2)
    assert states(journal) == {"a": "timed", "b": "timed", "c": "not reached", "d": "not reached"}


def test_a_child_that_is_killed_at_the_deadline_leaves_what_it_found(journal):
    def start(names, deadline):
        journal.add("one", "a", "warm", seconds=child.seconds([1.0, 3.0]))
        journal.add("one", "b", "begun")
        time.sleep(0.02)
        return session.TIMED_OUT, ""

    groups = {"one": group({"a": None, "b": None})}
    session.drain(groups, journal, start, time.time() + 0.01)
    last = journal.last()
    assert states(journal) == {"a": "not reached", "b": "not reached"} and last["one", "a"]["seconds"]["median"] == 2.0


def test_lines_are_whole_on_disk_as_they_come(journal):
    journal.add("one", "a", "begun")
    journal.add("one", "a", "timed", seconds={"median": 1.0})
    lines = [json.loads(line) for line in journal.file.read_text().splitlines()]
    assert [line["state"] for line in lines] == ["begun", "timed"]
    assert list(journal.last()) == [("one", "a")] and journal.last()["one", "a"]["seconds"] == {"median": 1.0}
    with pytest.raises(ValueError, match="state: expected one of begun"):
        journal.add("one", "a", "fine")


def test_turns_alternate_their_order():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    assert [name for name, _ in timing.in_turns(runs, "cpu", 3)] == order == list("abccbaabc")


def test_the_table_gives_fractions_and_says_what_is_unproven_absent_and_not_reached(journal):
    def timed(contender, median, **more):
        journal.add("head", contender, "timed", seconds=child.seconds([median]), **more)

    journal.add(MACHINE, "facts", "done", figures={"gpu": "A GPU"})
    journal.add("check 1", "masks", "done", figures={})
    journal.add("check 1", "gram", "failed", error="ArithmeticError: gram, bfloat16: max error 1 > 0 | seed 5")
    journal.add(ROOFS, GEMM, "timed", seconds=child.seconds([1.0]), flops=4e12)
    journal.add(ROOFS, COPY, "timed", seconds=child.seconds([2.0]), bytes=4e12)
    timed("eager", 2.0, flops=2e12, bytes=1e12, clocks=[{"clocks.sm": "1980 MHz"}, {"clocks.sm": "1755 MHz"}])
    timed("fastguard", 0.5, flops=1e12, figures={"live": 0.066, "kernels": {"scan": 0.25}}, peak_bytes=3e6)
    journal.add("head", "liger", "absent", error="No module named 'liger_kernel'")
    journal.add("head", "quack", "not reached")
    shown = ("eager", "fastguard", "liger", "quack", "not begun")
    groups = {ROOFS: Group((GEMM, COPY), None), "head": Group(shown, None, ("gram", "masks"))}
    text = table.markdown(journal.last(), groups)
    assert "| gram | **unproven**: failed: ArithmeticError: gram, bfloat16: max error 1 > 0 \\| seed 5 |" in text
    assert "| masks | agrees |" in text
    assert "| eager | 2,000 | 2,000 to 2,000 | 1.00 |  | 0.5 Tbyte/s | 25% | 25% |  |  |" in text
    assert "| fastguard | 500 | 500 to 500 | 0.25 | 3 | 2 Tflop/s | 50% |  | 0.066 | **unproven**: gram |" in text
    assert "absent: No module named 'liger_kernel'" in text and "| not reached |" in text and "not begun" not in text
    assert "before 1980 MHz; after 1755 MHz" in text and "Kernels of fastguard, ms: `scan` 0.25." in text


def test_a_plain_step_on_paper_has_the_flops_that_torch_counts():
    """With the head, of two layers, beside which attention's scores are few."""
    shapes = REHEARSAL._replace(hidden=32, mlp=48, tokens=16)
    model, given = steps.language_model(shapes, 2), steps.batch(shapes, 0)
    with FlopCounterMode(display=False) as counter:
        model(**given, use_cache=False).loss.backward()
    assert 0.9 < steps.on_paper(shapes, 2, steps.PLAIN[0]) / counter.get_total_flops() < 1.1
    more = steps.on_paper(shapes, 2, "fastguard RepNoise") / steps.on_paper(shapes, 2, steps.PLAIN[1])
    assert 0.7 < more < 1.5


def test_a_folder_of_kernels_is_proven_where_all_ops_are_that_it_serves():
    found = session.by_folder(dict.fromkeys(OPS, "") | {"lens_stats": "max error"})
    assert found["lm_head_stats"] == "lens_stats: max error"
    assert not any(wrong for folder, wrong in found.items() if folder != "lm_head_stats")


def test_a_folder_of_results_and_a_missing_one_of_wheels_are_refused(tmp_path, journal):
    with pytest.raises(FileNotFoundError, match="peers: expected a folder of wheels"):
        session.run(REHEARSAL, tmp_path, 1, wheels=tmp_path / "none")
    journal.add("one", "a", "begun")
    with pytest.raises(FileExistsError, match="results of another run"):
        session.run(REHEARSAL, tmp_path, 1)


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Processes that do nothing but say what they are told to: a function of (journal, group, contender)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def pretend(says):
        def starter(shapes, file, folder, own, recorded):
            groups, journal = all_groups(shapes), Journal(file)

            def start(names, deadline):
                for name in names:
                    for contender in groups[name].contenders:
                        says(journal, name, contender)
                return 0, ""

            return start

        monkeypatch.setattr(session, "starter", starter)
        return ["--gpu", "--out", str(tmp_path / "out")]

    return pretend


def test_the_command_keeps_a_proof_of_what_agrees_and_fails_where_an_op_does_not(pretended, tmp_path, capsys):
    of = {"gpu": "A GPU", "kernels": "0123", "triton": "3.6.0", "torch": "2.11.0"}

    def says(journal, name, contender):
        if contender == "gram":
            journal.add(name, contender, "failed", error="ArithmeticError: gram: max error")
        else:
            journal.add(name, contender, "done", figures=of)

    assert command.main([*pretended(says), "--check"]) == 1
    kept = json.loads(proof.file_of(of).read_text())
    assert {key: kept[key] for key in of} == of
    assert {op for op, wrong in kept["ops"].items() if wrong} == {"gram"} and kept["ops"].keys() == set(OPS.values())
    said = capsys.readouterr().out
    assert "gram: ArithmeticError: gram: max error" in said and f"{len(OPS) - 1} of {len(OPS)} ops agree" in said
    assert "**unproven**: failed: ArithmeticError" in (tmp_path / "out" / "table.md").read_text()


def test_every_group_is_started_and_has_its_table(pretended, tmp_path):
    def says(journal, name, contender):
        journal.add(name, contender, "done", figures=dict.fromkeys(proof.KEYS, "any") if name == MACHINE else {})

    assert command.main(pretended(says)) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    for name in all_groups(LLAMA_8B):
        assert name.startswith((MACHINE, tune.FIT, tune.TUNE, CHECK)) or f"## {name}" in text


def test_without_a_device_the_command_says_so(pretended, capsys):
    given = pretended(lambda journal, name, contender: journal.add(name, contender, "failed", error="no CUDA"))
    with pytest.raises(SystemExit) as ended:
        command.main(given)
    assert ended.value.code == 2 and "fastguard bench: device: no CUDA" in capsys.readouterr().err

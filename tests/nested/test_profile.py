"""What the engine reports of a step: own times, bytes that are multiples of the parameters', and nothing unasked."""

from __future__ import annotations

import threading

import pytest
import torch

from fastguard import methods
from fastguard.nested import profile
from methods.batches import make, streams
from tiny_models import tiny


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(profile, "time", found)
    return found


def test_each_part_is_charged_its_own_time(clock):
    with profile.listening() as found:
        with profile.span("outer", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)], 2):
            clock.now += 1
            for _ in range(2):
                with profile.span("inner", [torch.zeros(5, dtype=torch.bfloat16)], 3):
                    clock.now += 10
            clock.now += 2
        clock.now += 50
    assert found.rows() == [
        {"part": "inner", "seconds": 20.0, "bytes": 2 * 3 * 5 * 2},
        {"part": "outer", "seconds": 3.0, "bytes": 2 * (3 * 4 + 2 * 8)},
    ]


def test_a_part_that_fails_is_charged_and_closed(clock):
    def fail():
        with profile.span("whole"):
            clock.now += 4
            raise KeyboardInterrupt

    with profile.listening() as found:
        with profile.span("around"), pytest.raises(KeyboardInterrupt):
            fail()
        clock.now += 1
        with profile.span("after"):
            clock.now += 2
    assert found.seconds == {"whole": 4.0, "around": 0.0, "after": 2.0}


def test_who_does_not_listen_hears_nothing(clock):
    assert profile.span("a", [torch.zeros(2)], 1) is profile.span("b")
    with profile.listening() as outer:
        with profile.listening() as inner, profile.span("a"):
            clock.now += 1
        with profile.span("b"):
            clock.now += 2
        thread = threading.Thread(target=lambda: outer.seconds.update(other=profile.span("c") is profile._NOBODY))
        thread.start()
        thread.join()
    assert inner.seconds == {"a": 1.0} and outer.seconds == {"b": 2.0, "other": True}
    with profile.span("a"):
        clock.now += 5
    assert inner.seconds == {"a": 1.0}


def test_a_report_may_be_compiled():
    def run(x):
        with profile.span("a", [x], 1):
            return 2 * x

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with profile.listening() as found:
        assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert not found.seconds


STEPS = {
    "tar": {
        "snapshot": 2, "restore": 2, "inner AdamW": 7 * 2, "accumulate": 2 + 3, "reference exchange": 8, "norms": 1,
    },
    "booster": {"snapshot": 2, "restore": 2, "perturb": 3, "accumulate": 3 * 2, "norms": 3},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:alpha. the step of length")
@pytest.mark.parametrize("name", STEPS)
def test_the_bytes_of_a_step_are_multiples_of_the_parameters(name):
    model = tiny("llama", num_hidden_layers=2)
    size = sum(4 * p.numel() for p in model.parameters())
    method = make(methods.find(name), model)
    with profile.listening() as found:
        method.backward(**method.draw(streams(method.roles)))
    assert {part: moved / size for part, moved in found.bytes.items() if moved} == STEPS[name]
    assert {"parameter lists", "random numbers"} <= found.seconds.keys()


def test_a_perturbation_of_activations_is_reported():
    model = tiny("llama", num_hidden_layers=2)
    method = make(methods.find("vaccine"), model)
    batches = method.draw(streams(method.roles))
    with profile.listening() as found:
        method.backward(**batches)
    shift = 2 * 4 * batches["harmless"]["input_ids"].numel() * model.config.hidden_size  # of both blocks
    assert found.bytes["activation perturbation"] == 3 * shift
    assert found.bytes["norms"] == (1 + 4) * shift + sum(4 * p.numel() for p in model.parameters())

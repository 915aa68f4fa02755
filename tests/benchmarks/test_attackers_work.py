"""What the benchmark of several attackers runs, on a tiny model; nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tiny_models import VOCABULARY, assert_same_gradients, gradients, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from end_to_end import attackers_work as work
from end_to_end.nested_step import Streams


def test_contenders_train_the_same_adapters_and_read_the_same_gradient():
    pool = torch.randint(1, VOCABULARY, (20, 8), generator=torch.Generator().manual_seed(0))
    model = tiny("llama", torch.float64, num_hidden_layers=2)
    at_work = work.Work(model, Streams(pool, 2))
    found = {}
    for contender in work.CONTENDERS:
        at_work.run(contender)
        found[contender] = gradients(model)
    assert_same_gradients(found["one forward"], found["one by one"], 1e-6)
    with pytest.raises(AssertionError):
        assert_same_gradients(found["one forward"], found["all weights"], 1e-3)

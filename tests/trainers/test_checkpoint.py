"""fastguard.trainers.save and load in one process; killed and distributed runs are in tests/examples."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from fastguard.trainers import checkpoint, load, save


class Counter:
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value, "drawn": list(range(self.value))}

    def load_state_dict(self, state):
        self.value = state["value"]
        assert state["drawn"] == list(range(self.value))


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A frozen layer, a trained one, one that gets no gradient at first, and a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model.late = nn.Parameter(torch.ones(()))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def step(model, optimizer, late=False):
    (model(torch.randn(3, 4)) * (model.late if late else 1)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_loaded_run_goes_on_with_the_same_bits(tmp_path):
    model, optimizer = fresh()
    for _ in range(3):
        step(model, optimizer)
    assert model.late not in optimizer.state
    optimizer.param_groups[0]["lr"] = 0.05
    save(tmp_path, 3, model, optimizer, {"counter": Counter(5)})
    step(model, optimizer, late=True)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = random.random(), torch.rand(2)

    other, its = fresh()
    step(other, its, late=True)  # whatever it has done before
    counter = Counter()
    assert load(tmp_path, other, its, {"counter": counter}) == 3
    assert counter.value == 5
    assert other.late not in its.state
    assert its.param_groups[0]["lr"] == 0.05
    step(other, its, late=True)
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
    assert random.random() == drawn[0]
    assert torch.equal(torch.rand(2), drawn[1])


def test_frozen_parameters_are_not_saved(tmp_path):
    import torch.distributed.checkpoint as dcp

    model, optimizer = fresh()
    path = save(tmp_path, 1, model, optimizer)
    names = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert "model.2.weight" in names and "model.1.running_mean" in names
    assert not any(name.startswith("model.0.") for name in names)


def test_the_newest_are_kept_and_pointed_to(tmp_path):
    model, optimizer = fresh()
    assert load(tmp_path, model, optimizer) == 0
    (tmp_path / "step-00000009.partial").mkdir()
    for i in (1, 2, 3):
        step(model, optimizer)
        path = save(tmp_path, i, model, optimizer, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    files = sorted(p.stat().st_mtime_ns for p in path.iterdir())
    assert save(tmp_path, 3, model, optimizer) == path
    assert sorted(p.stat().st_mtime_ns for p in path.iterdir()) == files  # it is there already


def test_what_does_not_fit_is_refused(tmp_path):
    model, optimizer = fresh()
    save(tmp_path, 1, model, optimizer, {"defense": Counter()})
    with pytest.raises(ValueError, match=r"counted: expected \['defense'\].* got \[\]"):
        load(tmp_path, model, optimizer)
    two = torch.optim.AdamW([{"params": [model.late]}, {"params": list(model[2].parameters())}])
    with pytest.raises(ValueError, match="optimizer: expected 1 parameter groups, got 2"):
        load(tmp_path, model, two, {"defense": Counter()})


def test_another_number_of_ranks_goes_on_with_random_numbers_of_its_own(tmp_path, monkeypatch):
    model, optimizer = fresh()
    save(tmp_path, 1, model, optimizer, {"defense": Counter()})
    after = torch.rand(3)
    for name, place in (("ranks", 4), ("rank", 3)):
        monkeypatch.setattr(checkpoint, name, lambda place=place: place)
    drawn = []
    for _ in range(2):
        assert load(tmp_path, model, optimizer, {"defense": Counter()}) == 1
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], after)


def test_large_tensors_of_what_is_counted_are_not_packed_but_written_as_they_are(tmp_path):
    import torch.distributed.checkpoint as dcp

    class Kept:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    model, optimizer = fresh()
    large, small = torch.randn(64, 64).bfloat16(), torch.randn(3)
    path = save(tmp_path, 1, model, optimizer, {"kept": Kept({"of": [{"delta": large, "steps": 2}], 3: (small,)})})
    names = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    assert [name for name in names if "kept" in name] == ["rank.0.kept.of.0.delta"]
    other = Kept({})
    assert load(tmp_path, model, optimizer, {"kept": other}) == 1
    found = other.state["of"][0]
    assert torch.equal(found["delta"], large) and found["delta"].dtype == torch.bfloat16 and found["steps"] == 2
    assert torch.equal(other.state[3][0], small)

"""Layers that are compiled while a model is trained: the same steps, and nothing left on the model."""

import pytest
import torch
from torch._dynamo.utils import counters

import tiny
from fastguard import methods, parallel
from fastguard.run import pipeline
from fastguard.run.config import from_dict
from fastguard.run.keep import Keeper
from fastguard.run.train import train
from methods.batches import make, streams


def trained(backend):
    """Weights after two steps of RepNoise, whose taps are on the layers and in them, under checkpointing."""
    model = tiny.model()
    parallel.checkpoint_layers(model)
    method = make(methods.find("repnoise"), model)
    train(method, streams(method.roles), lr=1e-3, steps=2, keeper=Keeper(None, backend=backend))
    method.close()
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_compiled_layers_take_the_steps_of_uncompiled_ones():
    start = torch.cat([p.detach().flatten() for p in tiny.model().parameters()])
    plain = trained(None)
    counters.clear()
    found = trained("aot_eager")
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert (found - plain).norm() < 1e-5 * (plain - start).norm()


def test_a_method_under_which_layers_cannot_be_compiled_is_named_before_a_model_is_loaded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.models, "load_model", None)
    for method, section, processes in (
        ("vaccine", "immunize", 1),
        ("seam", "variants.other", 1),
        ("repnoise", "immunize", 2),
    ):
        monkeypatch.setattr(pipeline, "ranks", lambda: processes)
        tree = {**small.to_dict(), "variants": {}, "parallel": {"compile": True}, "immunize": {"method": method}}
        if section != "immunize":
            tree |= {"immunize": {"method": "sft"}, "variants": {"other": {"method": method}}}
        with pytest.raises(
            ValueError, match=f"parallel.compile: expected false with {section}.method {method}, got true"
        ):
            pipeline.run(from_dict(tree), tmp_path / "run")

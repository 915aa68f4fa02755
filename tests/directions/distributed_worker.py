"""One of two processes that check directions on sharded data and under FSDP2: ``distributed_worker.py RANK STORE``.

The reference is one process with all the data and the model as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

from directions.planted import planted, prompts
from fastguard import directions
from losses.distributed_worker import main
from tiny_models import gradients

HARMFUL, HARMLESS = prompts(True, 3, padding="left"), prompts(False, 2, padding="left")


def sharded(case: dict) -> torch.nn.Module:
    model = planted(3)[0]
    if not case.get("shard"):
        return model
    mesh = init_device_mesh("cpu", (2,))
    if case["shard"] == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def estimate(case: dict, rank: int) -> None:
    """Rank 0 has a batch more of the harmful class, rank 1 none at all of the harmless one."""
    mine = (HARMFUL[:2], HARMLESS) if rank == 0 else (HARMFUL[2:], [])
    options = dict(positions=2, second=True, last_output=True)
    model = sharded(case)
    found = directions.estimate(model, *mine, **options)
    store = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False  # the reference is one process
    try:
        expected = directions.estimate(planted(3)[0], HARMFUL, HARMLESS, **options)
    finally:
        torch.distributed.is_initialized = store
    assert found.counts == expected.counts == (24, 16)
    for name in ("harmful", "harmless", "harmful_square", "harmless_square"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)


def ablate(case: dict, rank: int) -> None:
    """Logits, and gradients, of a model that is sharded and ablated."""
    batch, direction = HARMFUL[rank], planted(3)[1]
    results = []
    for model in (planted(3)[0], sharded(case)):
        model.train()
        with directions.ablate(model, direction):
            loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
            loss.backward()
        results.append((loss.detach(), gradients(model)))
        with torch.no_grad():
            assert float(abs(model(**batch, labels=batch["input_ids"], use_cache=False).loss - loss)) > 1e-3
    (expected, own), (found, reduced) = results
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, gradient in own.items():
        torch.distributed.all_reduce(gradient)
        error = float((reduced[name].full_tensor() - gradient / 2).norm())
        assert error <= 1e-6 * float(gradient.norm()) + 1e-12, (name, error, float(gradient.norm()))  # norms in float32


def neurons(case: dict, rank: int) -> None:
    """Rank 1 has no batch at all."""
    direction = planted(3)[1]
    found = directions.neurons.neurons(sharded(case), HARMFUL if rank == 0 else [], direction)
    store = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False  # the reference is one process
    try:
        expected = directions.neurons.neurons(planted(3)[0], HARMFUL, direction)
    finally:
        torch.distributed.is_initialized = store
    assert found.tokens == expected.tokens == sum(int(b["attention_mask"].sum()) for b in HARMFUL)
    for name in ("mean", "alignment"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)


CASES: dict[str, dict] = {
    "estimate, sharded data": {"do": estimate},
    "estimate, sharded model": {"do": estimate, "shard": "plain"},
    "neurons, sharded data": {"do": neurons},
    "neurons, sharded model": {"do": neurons, "shard": "plain"},
    "ablate, sharded model": {"do": ablate, "shard": "plain"},
    "ablate, sharded model, checkpointing": {"do": ablate, "shard": "checkpointing"},
}

if __name__ == "__main__":
    main(CASES, lambda case, rank: case["do"](case, rank))

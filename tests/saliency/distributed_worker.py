"""One of two processes that check saliency under FSDP2 and on divided data: ``distributed_worker.py RANK STORE``.

The reference is one process with all the data and the model as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard import saliency
from fastguard.ops.masks import unpack_mask
from fastguard.saliency.sums import BACKWARD, STATISTICS, local
from losses.distributed_worker import main
from saliency.batches import batches
from tiny_models import tiny

BATCHES = batches(3)


def model_of(case: dict) -> torch.nn.Module:
    model = tiny(case.get("model", "llama"), torch.float64)
    if case.get("frozen"):
        model.requires_grad_(False)
    if case.get("ddp"):
        return torch.nn.parallel.DistributedDataParallel(model)
    if case.get("shard"):
        mesh = init_device_mesh("cpu", (2,))
        if case["shard"] == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def alone(case: dict) -> saliency.Scores:
    """The scores of one process."""
    store = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        collect = saliency.Collect(tiny(case.get("model", "llama"), torch.float64), STATISTICS, **options(case))
        collect.over(BATCHES)
        return collect.scores()
    finally:
        torch.distributed.is_initialized = store


def options(case: dict) -> dict:
    return {"vocabulary": bool(case.get("vocabulary"))}


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def collect(case: dict, rank: int) -> None:
    """Rank 0 has two batches, rank 1 one; with FSDP2 each keeps its rows alone."""
    model = model_of(case)
    mine = BATCHES[:2] if rank == 0 else BATCHES[2:]
    collecting = saliency.Collect(model, STATISTICS, **options(case))
    collecting.over(mine)
    scores, expected = collecting.scores(), alone(case)
    assert (scores.samples, scores.answer_tokens, scores.input_tokens) == (
        expected.samples, expected.answer_tokens, expected.input_tokens,
    )  # fmt: skip
    for kind in STATISTICS:
        for name in expected.names:
            if kind not in BACKWARD and name not in expected.inputs:  # of the vocabulary there are gradients alone
                continue
            value, true = scores.statistic(kind, name), expected.statistic(kind, name)
            if case.get("shard") and kind != "wanda":
                assert local(value).shape[0] <= (true.shape[0] + 1) // 2, (kind, name)
            assert float((whole(value) - true).norm() / true.norm()) < 1e-12, (kind, name)
    if case.get("shard"):
        assert all(p.grad is None for p in model.parameters())
    chosen = saliency.top(scores, saliency.weights_of(model), 0.1)
    again = saliency.top(expected, saliency.weights_of(tiny(case.get("model", "llama"), torch.float64)), 0.1)
    assert all(torch.equal(chosen[name], again[name]) for name in again)


def freeze(case: dict, rank: int) -> None:
    """Two steps of AdamW with decay: frozen entries keep their bits, the others move as in one process."""
    results = []
    for sharded in (True, False):
        model = model_of({"shard": True}) if sharded else tiny("llama", torch.float64)
        weights = saliency.weights_of(model)
        before = {name: weights(name).clone() for name in NAMES}
        masks = saliency.at_random(weights, dict.fromkeys(NAMES, 300), seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        with saliency.freeze(model, masks) as frozen:
            assert frozen.count == 300 * len(NAMES)
            for step in range(2):
                given = dict(BATCHES[step])
                model(**given).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        after = {name: weights(name).clone() for name in NAMES}
        for name in NAMES:
            held = unpack_mask(masks[name], before[name].shape)
            assert torch.equal(after[name][held], before[name][held])
            assert not (after[name][~held] == before[name][~held]).any()
        results.append(after)
    for name in NAMES:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-12)


NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight")

CASES = {
    "divided data": {"do": collect},
    "ddp": {"do": collect, "ddp": True},
    "fsdp2": {"do": collect, "shard": True},
    "fsdp2, asking no gradients": {"do": collect, "shard": True, "frozen": True},
    "fsdp2, checkpointing": {"do": collect, "shard": "checkpointing"},
    "fsdp2, vocabulary": {"do": collect, "shard": True, "vocabulary": True},
    "fsdp2, tied vocabulary": {"do": collect, "shard": True, "vocabulary": True, "model": "llama_tied"},
    "freeze": {"do": freeze},
}

if __name__ == "__main__":
    main(CASES, lambda case, rank: case["do"](case, rank))

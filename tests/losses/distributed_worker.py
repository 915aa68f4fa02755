"""One of two processes that check RepNoiseLoss under FSDP2 and DDP: ``python distributed_worker.py RANK STORE``.

The reference is one process that runs each rank's micro-batch at that rank's sample offset and averages.
Prints a line per case; raises at the first that fails.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard import Booster, CircuitBreakerLoss, LanguageModelLoss, RepNoiseLoss
from tiny_models import assert_same_gradients, gradients, pair, tiny

OPTIONS = {"beta": 0.5, "filter_tol": 0.0}
TOLERANCE = 1e-6
LAYERS = 2


def batches(kind: str) -> list:
    """One paired batch per rank; in ``masked`` no row of rank 1's harmful half is read, its labels are constants."""
    made = [pair(seed=rank, length=9) for rank in range(2)]
    if kind == "masked":
        harmful, harmless = made[1]
        same = torch.arange(9) % 2 == 0
        harmless["input_ids"][:, same] = harmful["input_ids"][:, same]
    return made


def model_of(case: dict) -> nn.Module:
    dtype = torch.float32 if case.get("mixed") else torch.float64
    model = tiny(case["model"], dtype, num_hidden_layers=LAYERS, vocab_size=97)
    if case.get("frozen"):
        model.lm_head.weight.requires_grad_(False)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def reference(case: dict) -> tuple[list[float], dict]:
    model = model_of(case)
    loss_fn = RepNoiseLoss(model, **OPTIONS)
    losses, total = [], None
    for rank, (harmful, harmless) in enumerate(batches(case["batch"])):
        loss_fn.call.zero_()
        loss = 0.0
        for _ in range(case.get("calls", 1)):
            loss = loss + loss_fn(
                harmful=harmful, harmless=harmless, retain=harmless if case.get("retain") else None,
                sample_offset=rank * harmful["input_ids"].shape[0], model=model,
            )  # fmt: skip
        loss.backward()
        losses.append(loss.item())
        found = {name: g / 2 for name, g in gradients(model).items()}
        total = found if total is None else {name: total[name] + g for name, g in found.items()}
    return losses, total


def shard(model: nn.Module, case: dict) -> nn.Module:
    if case["layout"] == "ddp":
        return DistributedDataParallel(model)
    how = {"mesh": init_device_mesh("cpu", (2,))}
    if case.get("mixed"):
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, **how)
    if case["layout"] == "norm and head":  # as accelerate groups them
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **how)
    fully_shard(model, reshard_after_forward=case.get("reshard"), **how)
    return model


def run(case: dict, rank: int) -> None:
    expected_losses, expected = reference(case)
    model = model_of(case)
    if case.get("late"):  # the loss is constructed on the sharded model
        wrapped = shard(model, case)
        loss_fn = RepNoiseLoss(wrapped, **OPTIONS)
    else:
        loss_fn = RepNoiseLoss(model, **OPTIONS)
        wrapped = shard(model, case)
    harmful, harmless = batches(case["batch"])[rank]
    retain = harmless if case.get("retain") else None
    if case.get("quiet"):  # a forward without backward leaves FSDP's root gathered; the next must not be stale
        with torch.no_grad():
            loss_fn(harmful=harmful, harmless=harmless, model=wrapped)
    given = {} if case.get("left out") else {"model": wrapped}
    loss = 0.0
    for _ in range(case.get("calls", 1)):
        loss = loss + loss_fn(harmful=harmful, harmless=harmless, retain=retain, **given)
    loss.backward()
    tolerance = 5e-2 if case.get("mixed") else TOLERANCE
    assert abs(loss.item() - expected_losses[rank]) <= tolerance * abs(expected_losses[rank]), (loss, expected_losses)
    found = {
        name.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g
        for name, g in gradients(wrapped).items()
    }
    assert_same_gradients(found, expected, tolerance)
    loss_fn.close()


def forgotten(_: int) -> None:
    """model= left out under DDP is an error of losses and methods; not without gradients, nor of the bare model."""
    model = tiny("llama", num_hidden_layers=1)
    losses = RepNoiseLoss(model, **OPTIONS), LanguageModelLoss(model), CircuitBreakerLoss(model)
    DistributedDataParallel(model)
    harmful, harmless = pair()
    calls: tuple[Callable[..., Tensor], ...] = (
        lambda **given: losses[0](harmful=harmful, harmless=harmless, **given),
        lambda **given: losses[1](harmful, **given),
        lambda **given: losses[1].sequence_logp(harmful, **given),
        lambda **given: losses[2](harmful=harmful, retain=harmless, **given),
    )
    for call in calls:
        refused(call)
        with torch.no_grad():
            call()
        assert call(model=model).requires_grad
    losses[1].hidden_states(harmful)
    refused(lambda: Booster(model).backward(harmful=harmful, harmless=harmless))


def refused(call: Callable[[], object]) -> None:
    try:
        call()
    except ValueError as error:
        assert "model: expected the model as DDP" in str(error) and "got none on 2 ranks" in str(error)
    else:
        raise AssertionError("each rank trained a model of its own without a word")


def rounded(_: int) -> None:
    """Shards of a bf16 model whose steps are rounded away, noticed on each rank; the default optimizer of a loop."""
    model = shard(tiny("llama", torch.bfloat16, num_hidden_layers=1), {"layout": "root"})
    loss_fn = RepNoiseLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    harmful, harmless = pair()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(9):
            loss_fn(harmful=harmful, harmless=harmless, model=model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum("rounds most of its training away" in str(w.message) for w in caught) == 1


CASES: dict[str, dict] = {
    "root": {"model": "llama", "batch": "plain", "layout": "root"},
    "root, checkpointing": {"model": "llama", "batch": "plain", "layout": "root", "checkpointing": True},
    "root resharded": {"model": "llama", "batch": "plain", "layout": "root", "reshard": True, "checkpointing": True},
    "norm and head": {"model": "llama", "batch": "plain", "layout": "norm and head"},
    "norm and head, checkpointing": {
        "model": "llama", "batch": "plain", "layout": "norm and head", "checkpointing": True,
    },
    "rank 1 reads no harmful row": {"model": "llama", "batch": "masked", "layout": "norm and head"},
    "tied": {"model": "llama_tied", "batch": "plain", "layout": "root", "checkpointing": True},
    "head bias": {"model": "phi", "batch": "plain", "layout": "root"},
    "constructed after sharding": {"model": "llama", "batch": "plain", "layout": "norm and head", "late": True},
    "after a call without gradients": {"model": "llama", "batch": "plain", "layout": "root", "quiet": True},
    "two calls, one backward": {
        "model": "llama", "batch": "plain", "layout": "norm and head", "checkpointing": True, "calls": 2,
    },
    "retain": {"model": "llama", "batch": "plain", "layout": "norm and head", "retain": True, "checkpointing": True},
    "frozen head": {"model": "llama", "batch": "plain", "layout": "root", "frozen": True},
    "bfloat16 products": {"model": "llama", "batch": "plain", "layout": "norm and head", "mixed": True},
    "ddp": {"model": "llama", "batch": "plain", "layout": "ddp"},
    "root, model left out": {"model": "llama", "batch": "plain", "layout": "root", "left out": True},
    "ddp, constructed on it, model left out": {
        "model": "llama", "batch": "plain", "layout": "ddp", "late": True, "left out": True,
    },
    "model forgotten": {"run": forgotten},
    "bfloat16 that rounds steps away": {"run": rounded},
    "ddp, checkpointing": {"model": "llama_tied", "batch": "plain", "layout": "ddp", "checkpointing": True},
}  # fmt: skip


def main(cases: dict[str, dict], run: Callable[[dict, int], None]) -> None:
    """Run every case in this one of two processes; a line for each that passed."""
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, case in cases.items():
        try:
            case["run"](rank) if "run" in case else run(case, rank)
        except BaseException as error:
            error.add_note(f"case: {name}")
            raise
        print(f"passed: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(CASES, run)

"""One of two processes that check that a step does not depend on the number of ranks: ``ranks_worker.py RANK STORE``.

The reference is the same method in one process on the undivided batches. Each rank gets a part of every batch, with
other numbers of samples and of tokens that carry loss than the other's. Prints a line per case; raises at the first
that fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard import methods
from fastguard.methods.training import Training
from fastguard.ranks import data_ranks
from methods.batches import make, streams
from tiny_models import assert_same_gradients, gradients, pair, tiny

TOLERANCE = 1e-10
STEPS = 2
"""Enough for what a step leaves to the next: directions, counters of noise and schedules."""
SIZES = 3, 2
"""Samples of each rank."""
ONLY = {
    "seam": {"product": "difference"}, "refat": {"every": 1}, "repnoise": {"beta": 0.5}, "sn_tune": {"samples": 2},
    "rsn_tune": {"samples": 2},
}  # fmt: skip
"""What wrapped models take, what shows, and one batch of which neurons are found."""
MORE = {
    "tar": {"dpo": {"tamper_loss": "dpo"}},
    "repnoise": {"short run": {"mask_padding": True, "boundary": "predicted", "output_alpha": 5.0, "layers": 1}},
    "circuit_breaker": {"answers": {"mask_padding": True, "positions": "labels"}},
    "random_mapping": {"without padding": {"mask_padding": True}},
    "sft": {"two batches": {"retain_weight": 0.7}},
    "crl": {"norm": {"distance": "norm", "benign_margin": 20.0, "harmful_margin": 20.0}},
}
SUMMED = "fsdp2, not divided"
"""As torchtitan does, whose losses are divided by all ranks' tokens."""
MICRO = {
    name: {"divided": {"micro": 2}}
    for name in ("repnoise", "tar", "booster", "vaccine", "t_vaccine", "sft", "random_mapping", "refat")
}
CASES = (
    {
        f"{name}, {how}, {layout}": (entry, {**ONLY.get(name, {}), **changes}, layout)
        for name, entry in methods.entries().items()
        if not entry.edits
        for how, changes in {"plain": {}, **MORE.get(name, {}), **MICRO.get(name, {})}.items()
        for layout in (("ddp", "fsdp2") if how == "plain" else ("fsdp2",))
    }
    | {
        f"{name}, plain, {SUMMED}": (methods.find(name), ONLY.get(name, {}), SUMMED)
        for name in ("repnoise", "tar", "vaccine", "crl")
    }
    | {
        f"tar, lora, {layout}": (
            methods.find("tar"),
            {"adversary": "lora", "adversaries": 2, "adversary_rank": 2},
            layout,
        )
        for layout in ("ddp", SUMMED)
    }
)


def whole(n: int, half: int) -> dict[str, Tensor]:
    """An undivided batch, in which rank 0's answers are shorter, and one ends in padding."""
    batch = pair(sum(SIZES), seed=n)[half]
    answer = torch.arange(batch["input_ids"].shape[1]) >= torch.tensor([6, 5, 6, 3, 3])[:, None]
    mask = batch["attention_mask"].clone()
    mask[0, -1] = 0
    return {**batch, "attention_mask": mask, "labels": batch["input_ids"].where(answer & (mask != 0), -100)}


def part(batch: Any, rank: int | None) -> Any:
    """A rank's samples of a batch, or of each of several by name; None: all."""
    if isinstance(batch, dict):
        return {key: part(value, rank) for key, value in batch.items()}
    return batch if rank is None else batch.split(SIZES)[rank]


def train(method: Training, model: nn.Module, rank: int | None) -> tuple[list[dict[str, Tensor]], list[dict]]:
    """Gradients and figures of a few steps."""
    data = streams(method.roles, whole)
    of_rank: dict[str, Callable[[int], Any]] = {k: lambda n, v=v: part(v(n), rank) for k, v in data.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found, figures = [], []
    for _ in range(STEPS):
        figures.append({k: float(v) for k, v in method.backward(**method.draw(of_rank), model=model).items()})
        whole_gradients = {
            name.removeprefix("module."): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in model.named_parameters() if p.grad is not None
        }  # fmt: skip
        found.append(whole_gradients)
        optimizer.step()
        optimizer.zero_grad()
    method.close()
    return found, figures


def made(case: tuple) -> Training:
    torch.manual_seed(0)
    entry, changes, _ = case
    return make(entry, tiny("llama", torch.float64, num_hidden_layers=2, vocab_size=97), **changes)


def shard(model: nn.Module, layout: str) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for group in (*base.model.layers, model) if layout == SUMMED else ():
        group.set_gradient_divide_factor(1.0)
    return model


def run(case: tuple, expected: tuple[list[dict[str, Tensor]], list[dict]], wrap: Callable[..., nn.Module]) -> None:
    method = made(case)
    wrapped = wrap(method.model)
    found, figures = train(method, wrapped, data_ranks(wrapped).rank)
    for step in range(STEPS):
        unread = {name for name in found[step].keys() - expected[0][step].keys() if not found[step][name].any()}
        ours = {name: g for name, g in found[step].items() if name not in unread}
        assert_same_gradients(ours, expected[0][step], TOLERANCE)
        assert figures[step].keys() == expected[1][step].keys()
        for name, value in expected[1][step].items():
            assert abs(figures[step][name] - value) <= 1e-8 * abs(value) + 1e-12, (step, name, figures[step], value)


# what is wrong on one rank alone -------------------------------------------------------------------------------------


def silent(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["input_ids"], -100)}


def same(batches: dict[str, Any]) -> dict[str, Any]:
    return {**batches, "harmless": batches["harmful"]}


def exhausted(batches: dict[str, Any]) -> dict[str, Any]:
    return {**batches, "adversaries": [replace(a, batches=list(a.batches)[:1]) for a in batches["adversaries"]]}


def of(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batches: {**batches, name: silent(batches[name])}


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "harmful_finetuning": (of("harmful"), "harmful: no token carries loss"),
    "booster": (of("harmful"), "harmful: no token carries loss"),
    "t_vaccine": (lambda b: {k: v for k, v in b.items() if k != "harmful"}, "harmful: step 0 measures the layers"),
    "repnoise": (same, "harmful: no token carries loss"),
    "tar": (exhausted, "adversary 'harmful': expected at least 2, got '1 batches'"),
    "seam": (of("benign"), "benign: no token carries loss"),
    "crl": (of("harmless"), "harmless: it has no response token"),
    "refat": (lambda b: {**b, "retain": {"input_ids": b["retain"]["input_ids"]}}, "retain: expected labels"),
    "circuit_breaker": (lambda b: {**b, "retain": {}}, "retain: expected input_ids of shape"),
}
"""Of each kind of check: what rank 1 makes of its batches, and what all ranks say."""


def refuse(name: str, rank: int) -> None:
    """Both ranks raise what is wrong on one of them, and the next step is as if nothing had been."""
    method = made((methods.find(name), ONLY.get(name, {}), ""))
    model = shard(method.model, "fsdp2")
    data = {k: lambda n, v=v: part(v(n), rank) for k, v in streams(method.roles, whole).items()}
    spoil, said = SPOILED[name]
    batches = method.draw(data)
    try:
        method.backward(**(spoil(batches) if rank else batches), model=model)
    except ValueError as error:
        assert re.match(rf"rank 1: \w+: {said}", str(error)), error
    else:
        raise AssertionError("nothing was raised")
    assert method.step == 0 and not gradients(model)
    method.backward(**method.draw(data), model=model)
    method.close()


REFUSED = {f"{name}, wrong on rank 1": name for name in SPOILED}


def main() -> None:
    rank, store, only = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    cases = {name: case for name, case in CASES.items() if not only or any(o in name for o in only)}
    expected = {name: train(method := made(case), method.model, None) for name, case in cases.items()}
    refused = {name: case for name, case in REFUSED.items() if not only or any(o in name for o in only)}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    for name in [*cases, *refused]:
        try:
            if name in refused:
                refuse(refused[name], rank)
            else:
                run(cases[name], expected[name], partial(shard, layout=cases[name][2]))
        except BaseException as error:
            error.add_note(f"case: {name}")
            raise
        print(f"passed: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

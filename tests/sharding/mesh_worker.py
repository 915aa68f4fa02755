"""One of four processes that check models on a mesh of data and tensor parallelism: ``mesh_worker.py RANK STORE``.

The mesh is 2 x 2. The reference is one process that averages over both data ranks' batches. Prints a line per case;
raises at the first that fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard import CircuitBreakerLoss, LanguageModelLoss, RepNoiseLoss, SimulatedAttack, methods
from fastguard.nested import AdamW, Reference, Weights
from fastguard.ranks import DataRanks, data_ranks
from methods import ranks_worker
from methods.batches import labelled, make, streams
from tiny_models import assert_same_gradients, gradients, pair, tiny

TOLERANCE = 1e-10
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def model_of(kind: str = "llama") -> nn.Module:
    return tiny(kind, torch.float64, num_hidden_layers=2)


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, head: bool = False) -> nn.Module:
    """Heads and MLPs divided among the ranks of ``mesh`` by torch's own styles, the rest on each.

    head: the vocabulary of the head too.
    """
    layers = range(len(model.model.layers))
    plan: dict[str, Any] = {f"model.layers.{i}.{name}": ColwiseParallel() for i in layers for name in COLUMNS}
    plan |= {f"model.layers.{i}.{name}": RowwiseParallel() for i in layers for name in ROWS}
    if head:
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def sequence_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """As `tensor_parallel`, and between these the ranks hold parts of the sequences."""
    parts, whole = Shard(1), Replicate()
    norms = ("input_layernorm", "post_attention_layernorm")
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=parts),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=parts, output_layouts=whole),
    }
    for i in range(len(model.model.layers)):
        layer = f"model.layers.{i}"
        plan |= {f"{layer}.{name}": SequenceParallel() for name in norms}
        plan |= {f"{layer}.{name}": ColwiseParallel() for name in COLUMNS}
        plan |= {f"{layer}.{name}": RowwiseParallel(output_layouts=parts) for name in ROWS}
        plan[f"{layer}.mlp"] = PrepareModuleInput(input_layouts=(parts,), desired_input_layouts=(whole,))
        plan[f"{layer}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": parts}, desired_input_kwarg_layouts={"hidden_states": whole}
        )
    return parallelize_module(model, mesh, plan)


def shard(model: nn.Module, mesh: DeviceMesh, apart: bool = False, **policy: Any) -> nn.Module:
    """``apart``: the embedding and [norm, head] are groups of their own; with tied weights they are one."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **policy)
    if apart:
        parts = [model.model.embed_tokens, model.model.norm, model.lm_head]
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        for group in [parts] if tied else [parts[:1], parts[1:]]:
            fully_shard(group, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def torch_styles(model: nn.Module, **options: Any) -> nn.Module:
    mesh = square()
    return shard(tensor_parallel(model, mesh["tp"], options.pop("head", False)), mesh["dp"], **options)


def by_transformers(model: nn.Module) -> nn.Module:
    """The model as transformers itself loads it on the mesh, by its own plan: the vocabulary is divided too."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    config = DistributedConfig(tp_size=2, fsdp_size=2)
    return AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float64, distributed_config=config).train()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients(model).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """What a loss does not read has no gradient in one process, and in wrappers one of zeros."""
    for name in found.keys() - expected.keys():
        assert not found.pop(name).any(), name
    assert_same_gradients(found, expected, TOLERANCE)


# losses ---------------------------------------------------------------------------------------------------------------


def repnoise(model: nn.Module) -> Callable[[nn.Module, int], Tensor]:
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)

    def loss(wrapped: nn.Module, data: int) -> Tensor:
        harmful, harmless = pair(seed=data)
        loss_fn.call.zero_()
        offset = data * len(harmful["input_ids"])
        return loss_fn(harmful=harmful, harmless=harmless, retain=harmless, sample_offset=offset, model=wrapped)

    return loss


def language_model(model: nn.Module) -> Callable[[nn.Module, int], Tensor]:
    loss_fn = LanguageModelLoss(model)
    return lambda wrapped, data: loss_fn(labelled(data, 0), model=wrapped)


def circuit_breaker(model: nn.Module) -> Callable[[nn.Module, int], Tensor]:
    loss_fn = CircuitBreakerLoss(model, layers=[0], alpha=2.0)

    def loss(wrapped: nn.Module, data: int) -> Tensor:
        loss_fn.call.fill_(7)
        return loss_fn(harmful=labelled(data, 0), retain=labelled(data, 1), model=wrapped)

    return loss


Made = Callable[[nn.Module], Callable[[nn.Module, int], Tensor]]


def equals_one_process(
    made: Made, wrap: Callable[..., nn.Module], kind: str = "llama", late: bool = False,
    adapted: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:  # fmt: skip
    """Loss and gradients of ``made`` on a model that ``wrap`` divides.

    late: the loss is made of the divided model. adapted: what is done to the model first.
    """
    alone = adapted(model_of(kind))
    loss, total, losses = made(alone), {}, []
    for data in range(2):
        value = loss(alone, data)
        value.backward()
        losses.append(value.item())
        for name, g in gradients(alone).items():
            total[name] = total.get(name, 0) + g / 2
    model = adapted(model_of(kind))
    if late:
        model = wrap(model)
    loss = made(model)
    wrapped = model if late else wrap(model)
    data = data_ranks(wrapped).rank
    value = loss(wrapped, data)
    value.backward()
    assert abs(value.item() - losses[data]) <= TOLERANCE * abs(losses[data]), (value.item(), losses)
    assert_same(whole_gradients(wrapped), total)


# nested methods -------------------------------------------------------------------------------------------------------


def simulated_attack(_: int) -> None:
    """AdamW steps along the mean gradient of both data ranks; where it is read, and that all is put back."""

    def loss(model: nn.Module, i: int, data: int) -> Tensor:
        return model(**labelled(10 * i + data, 0)).loss

    def mean(model: nn.Module, i: int) -> dict[str, Tensor]:
        sum(loss(model, i, data) / 2 for data in range(2)).backward()
        return gradients(model)

    alone = model_of()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2, weight_decay=0.1)
    expected: dict[str, Tensor] = {}
    for i in range(3):
        for name, g in mean(alone, i).items():
            alone.get_parameter(name).grad = g
        optimizer.step()
        optimizer.zero_grad()
        for name, g in mean(alone, 7).items():
            expected[name] = expected.get(name, 0) + (i + 1) * g
    wrapped = torch_styles(model := model_of())
    before = [t.clone() for t in Weights(wrapped).local()]
    data = data_ranks(wrapped).rank
    with SimulatedAttack(model, AdamW(lr=1e-2, weight_decay=0.1)).at(wrapped) as tampered:
        for i in range(3):
            tampered.step(loss(wrapped, i, data))
            tampered.accumulate(loss(wrapped, 7, data), weight=i + 1)
    assert all(map(torch.equal, Weights(wrapped).local(), before))
    assert_same(whole_gradients(wrapped), expected)


def norms(_: int) -> None:
    """Norms and inner products are those of the whole model, on every rank."""
    alone = model_of()
    expected = sum(p.double().square().sum() for p in alone.parameters()).sqrt()
    for wrapped in (torch_styles(model_of()), torch_styles(model_of(), head=True, apart=True)):
        weights = Weights(wrapped)
        torch.testing.assert_close(weights.norm(weights.local()), expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(weights.dot(weights.local(), weights.local()), expected**2, rtol=1e-13, atol=0)


def reference(_: int) -> None:
    """The initial weights, taken whole before the model was divided, stand in for the live ones for a forward."""
    alone, model = model_of(), model_of()
    initial = Reference(model)
    wrapped = torch_styles(model, head=True)
    weights = Weights(wrapped)
    with torch.no_grad():
        for t in weights.local():
            t.mul_(1.25)
    moved = [t.clone() for t in weights.local()]
    with torch.no_grad(), initial.installed(wrapped) as there:
        torch.testing.assert_close(
            there(**labelled(0, 0)).logits, alone(**labelled(0, 0)).logits, rtol=1e-10, atol=1e-12
        )
    assert all(map(torch.equal, Weights(wrapped).local(), moved))


DIVIDED = {
    name: (entry, ranks_worker.ONLY.get(name, {}), "mesh")
    for name, entry in methods.entries().items()
    if not entry.edits and name not in ("lora", "sn_tune", "rsn_tune")
}
"""Dividing adapters is PEFT's; the others are refused: below."""

EXPECTED: dict[str, Any] = {}
"""Of each, what one process makes of the undivided batches, before it is one of several."""


def every_method(_: int) -> None:
    """Each method that trains leaves the gradient of one process; the data ranks have parts of its batches."""
    for name, case in DIVIDED.items():
        try:
            ranks_worker.run(case, EXPECTED[name], torch_styles)
        except BaseException as error:
            error.add_note(f"method: {name}")
            raise


# what is refused ------------------------------------------------------------------------------------------------------


def refusals(_: int) -> None:
    mesh = square()
    model = model_of()
    loss_fn = LanguageModelLoss(model)
    wrapped = shard(sequence_parallel(model, mesh["tp"]), mesh["dp"])
    batch = {k: v[:, :8] for k, v in labelled(0, 0).items()}
    refused(lambda: loss_fn(batch, model=wrapped), "sequence parallelism is not supported")
    model = tensor_parallel(model_of(), mesh["tp"])
    loss_fn = LanguageModelLoss(model)
    refused(lambda: loss_fn(batch), "tensor-parallel over 2 of 4 ranks, and nobody averages")
    neurons = make(methods.entries()["sn_tune"], model_of())
    wrapped = torch_styles(neurons.model)
    data = neurons.draw(streams(neurons.roles))
    refused(lambda: neurons.backward(**data, model=wrapped), "it is tensor-parallel; expected whole layers")
    contexts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    model = model_of()
    loss_fn = LanguageModelLoss(model)
    wrapped = shard(model, contexts._flatten("dp_shard_cp"))
    refused(lambda: loss_fn(batch, model=wrapped), r"2 ranks of context parallelism \(cp\)")
    refused(lambda: Weights(wrapped), r"2 ranks of context parallelism \(cp\)")


def who_sees_other_data(rank: int) -> None:
    def expect(model: nn.Module, place: int, size: int) -> None:
        found = data_ranks(model)
        assert (found.rank, found.size) == (place, size), found
        if size > 1:
            everyone: list[int] = [-1] * size
            dist.all_gather_object(everyone, found.rank, group=found.group)
            assert everyone == list(range(size)), everyone

    mesh = square()
    hybrid = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    expect(tiny(), rank, 4)
    expect(DistributedDataParallel(tiny()), rank, 4)
    expect(shard(tiny(), init_device_mesh("cpu", (4,))), rank, 4)
    expect(shard(tiny(), replicas), rank, 4)
    expect(shard(tensor_parallel(tiny(), mesh["tp"]), mesh["dp"]), rank // 2, 2)
    expect(shard(tensor_parallel(tiny(), hybrid["tp"]), hybrid["replicate", "shard"]), rank // 2, 2)
    expect(DistributedDataParallel(nn.Linear(2, 2), process_group=mesh.get_group("dp")), rank // 2, 2)
    inside = tiny()
    fully_shard(nn.Sequential(inside), mesh=mesh["dp"])
    expect(inside, rank // 2, 2)  # what a wrapper around it is sharded over
    assert data_ranks(tensor_parallel(tiny(), init_device_mesh("cpu", (4,)))) == DataRanks(0, 1, None)
    refused(lambda: data_ranks(tensor_parallel(tiny(), mesh["tp"])), "tensor-parallel over 2 of 4 ranks")
    experts = tiny()
    fully_shard(experts.model.layers[0], mesh=mesh["dp"])
    fully_shard(experts, mesh=init_device_mesh("cpu", (4,)))
    refused(lambda: data_ranks(experts), "sharded over different ranks.*expert parallelism")


def refused(call: Callable[[], object], pattern: str) -> None:
    """``call`` raises a ValueError whose message matches."""
    with pytest.raises(ValueError, match=pattern):
        call()


EVERY = "every method"

CASES: dict[str, Callable[[int], None]] = {
    "who sees other data": who_sees_other_data,
    "norms": norms,
    "repnoise": lambda _: equals_one_process(repnoise, torch_styles),
    "repnoise, divided head in groups of its own": lambda _: equals_one_process(
        repnoise, lambda model: torch_styles(model, head=True, apart=True)
    ),
    "repnoise, tied, groups of its own": lambda _: equals_one_process(
        repnoise, lambda model: torch_styles(model, apart=True), "llama_tied"
    ),
    "repnoise, by transformers": lambda _: equals_one_process(repnoise, by_transformers, late=True),
    "repnoise, tied, by transformers": lambda _: equals_one_process(repnoise, by_transformers, "llama_tied", late=True),
    "language model, made of the divided model": lambda _: equals_one_process(
        language_model, lambda model: torch_styles(model, head=True), late=True
    ),
    "circuit breaker": lambda _: equals_one_process(circuit_breaker, torch_styles),
    "simulated attack": simulated_attack,
    "reference": reference,
    EVERY: every_method,
    "refusals": refusals,
}


def main() -> None:
    rank, store, only = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for name, case in DIVIDED.items() if not only or EVERY in only else ():
        method = ranks_worker.made(case)
        EXPECTED[name] = ranks_worker.train(method, method.model, None)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if only and name not in only:
            continue
        try:
            case(rank)
        except BaseException as error:
            error.add_note(f"case: {name}")
            raise
        print(f"passed: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""One of two processes that check what taps and attacks do beside FSDP2: ``fsdp2_worker.py RANK STORE``.

Prints a line per case; raises at the first that fails.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard import Booster, LanguageModelLoss, RepNoiseLoss, SimulatedAttack
from fastguard.nested import SGD, Reference
from fastguard.taps import anchor
from methods.batches import labelled
from plan.live import Watch, held_by
from sharding.mesh_worker import assert_same, equals_one_process, language_model, repnoise, shard, whole_gradients
from tiny_models import gradients, pair, tiny

V, D = 2003, 32


def sharded(model: nn.Module, apart: bool = True, mesh: tuple[int, ...] = (2,), **policy: Any) -> nn.Module:
    names = ("replicate", "shard")[-len(mesh) :]
    return shard(model, init_device_mesh("cpu", mesh, mesh_dim_names=names), apart, **policy)


# one parameter --------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, 3, dtype=dtype))

    def forward(self) -> Tensor:
        return self.weight.sum()


def token_of(model: Table) -> Tensor:
    model()  # FSDP2 begins at its first forward
    model.reshard()  # type: ignore[operator]
    token = anchor.Source(model, model.weight).token()
    assert token is not None
    return token


def reductions(_: int) -> None:
    """Bits of a gradient that the anchor reduces: layouts, uneven shards, blocks, divide factors, dtypes."""
    policies = (None, None), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, None)
    layouts = (((2,), 7), ((2,), 1), ((2, 1), 7), ((1, 2), 8))
    for blocks in (1, 1 << 20):
        anchor.BLOCK = blocks
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for mesh, rows in layouts:
                grads = [torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
                grads = [g.to(torch.float64 if dtype == torch.float64 else torch.float32) for g in grads]
                for param, reduce in policies:
                    for factor in (None, 1.0):
                        model = Table(dtype, rows)
                        names = ("replicate", "shard")[-len(mesh) :]
                        fully_shard(
                            model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names),
                            mp_policy=MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce),
                        )  # fmt: skip
                        if factor is not None:
                            model.set_gradient_divide_factor(factor)  # type: ignore[operator]
                        wide = reduce or param or dtype
                        each = [(g / (factor or 2.0)).to(wide) for g in grads]
                        token_of(model).backward(grads[dist.get_rank()])
                        found = model.weight.grad.full_tensor()  # type: ignore[union-attr, operator]
                        assert torch.equal(found, (each[0] + each[1]).to(dtype)), (dtype, mesh, rows, param, reduce)
    anchor.BLOCK = 128 << 20


# losses ---------------------------------------------------------------------------------------------------------------


def divide_factor(_: int) -> None:
    """A sum over the ranks, as torchtitan wants it, is one for the head and the norm too."""
    alone, model = (tiny("llama", torch.float64, num_hidden_layers=2) for _ in range(2))
    loss = language_model(alone)
    sum(loss(alone, data) for data in range(2)).backward()
    loss = language_model(model)
    wrapped = sharded(model)
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    loss(wrapped, dist.get_rank()).backward()
    assert_same(whole_gradients(wrapped), gradients(alone))


def checkpointed(model: nn.Module) -> nn.Module:
    """Each layer recomputed as a whole, with the taps on it: what the taps read is gathered again in the backward."""
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def adapters_on_the_head(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape).to(p))
    return model


def offloaded(model: nn.Module) -> nn.Module:
    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


# memory ---------------------------------------------------------------------------------------------------------------


def large(watch: Watch) -> int:
    """Storages that are as large as a head."""
    sizes = [s.nbytes() for ref in list(watch._storages.values()) if (s := ref()) is not None]
    return sum(size >= V * D * 4 for size in sizes)


def heads_alive(kind: str, make: Callable[[nn.Module], Callable[[nn.Module], Tensor]], apart: bool = True) -> list[int]:
    """How many tensors as large as a head live when the backward leaves layers 2 and 1 of 0 to 3.

    Layer 3's is left out: FSDP2 still holds what it has sent of the head's group.
    """
    model = tiny(kind, num_hidden_layers=4, vocab_size=V)
    loss = make(model)
    wrapped = sharded(model, apart)
    loss(wrapped).backward()  # FSDP2 makes its buffers
    gradients(wrapped)
    wrapped.reshard()  # type: ignore[operator]
    found: list[int] = []
    with Watch(held_by(wrapped), resized=True).on() as watch:
        for layer in list(model.model.layers)[1:]:
            layer.register_full_backward_hook(lambda *_: found.append(large(watch)))
        value = loss(wrapped)
        value.backward()
    return found[1:]


def memory(_: int) -> None:
    def output(model: nn.Module) -> Callable[[nn.Module], Tensor]:
        loss_fn = LanguageModelLoss(model)
        return lambda wrapped: loss_fn(labelled(dist.get_rank(), 0), model=wrapped)

    def all_layers(model: nn.Module) -> Callable[[nn.Module], Tensor]:
        loss_fn = RepNoiseLoss(model)
        harmful, harmless = pair(seed=dist.get_rank())
        return lambda wrapped: loss_fn(harmful=harmful, harmless=harmless, model=wrapped)

    def plain(model: nn.Module) -> Callable[[nn.Module], Tensor]:
        return lambda wrapped: wrapped(**labelled(dist.get_rank(), 0)).loss

    for kind in ("llama", "llama_tied"):
        for apart in (True, False):
            own = heads_alive(kind, plain, apart)  # FSDP2's: the embedding, a tied weight and what waits for it
            assert len(own) == 2 and (any(own) or (kind == "llama" and apart)), own
            assert heads_alive(kind, output, apart) == own, (kind, apart)
            every = [n + 2 for n in own]  # the gathered copy and the buffer, which the first state's tap needs too
            assert heads_alive(kind, all_layers, apart) == every, (kind, apart)


def reducing(_: int) -> None:
    """Beside the buffer that taps have summed the gradient in there is this rank's part of it, and a block."""
    model = Table(torch.float32, rows=20_001)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    whole, token = 20_001 * 3 * 4, token_of(model)
    grad = torch.ones(20_001, 3)
    anchor.BLOCK = whole // 16
    with Watch([*held_by(model), grad], resized=True) as watch:
        token.backward(grad)
    anchor.BLOCK = 128 << 20
    assert whole / 2 <= watch.peak < whole * 3 / 4, watch.peak / whole


# flags ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noted(wrapped: nn.Module, seen: list[Any], flags: Callable[[], Any]) -> Iterator[None]:
    """The engine's flags whenever a backward comes to the first layer."""
    layer = next(m for n, m in wrapped.named_modules() if n.endswith("layers.0.mlp"))
    hook = layer.register_full_backward_hook(lambda *_: seen.append(flags()))
    yield
    hook.remove()


def flags(_: int) -> None:
    """A trainer's flags are other ones in a method's backwards, and the trainer's again after them."""
    for replicated in (False, True):
        model = tiny("llama", torch.float64, num_hidden_layers=2)
        booster, attack, initial = Booster(model), SimulatedAttack(model, SGD(lr=0.1)), Reference(model)
        wrapped = DistributedDataParallel(model) if replicated else sharded(model)
        batch = labelled(dist.get_rank(), 0)

        def now(wrapped: Any = wrapped, replicated: bool = replicated) -> set[bool]:
            if replicated:
                return {wrapped.require_backward_grad_sync}
            states = [m._get_fsdp_state() for m in wrapped.modules() if isinstance(m, FSDPModule)]
            groups = [group for state in states for group in state._fsdp_param_groups]
            return {states[0]._state_ctx.is_last_backward} | {g.reduce_grads and g.all_reduce_grads for g in groups}

        def attacked(wrapped: nn.Module = wrapped, batch: Any = batch, attack: Any = attack) -> None:
            with attack.at(wrapped) as tampered:
                tampered.step(wrapped(**batch).loss)
                tampered.accumulate(wrapped(**batch).loss)

        def consulted(wrapped: nn.Module = wrapped, batch: Any = batch, initial: Any = initial) -> None:
            with initial.installed(wrapped):
                wrapped(**batch)

        for run, backwards in (
            (attacked, 2), (consulted, 0),
            (lambda: booster.backward(harmful=batch, harmless=labelled(dist.get_rank(), 1), model=wrapped), 3),
        ):  # fmt: skip
            if replicated:
                wrapped.require_backward_grad_sync = False
            else:
                wrapped.set_is_last_backward(False)
                wrapped.set_requires_gradient_sync(False)
            seen: list[Any] = []
            with noted(wrapped, seen, now):
                run()
            assert seen == [{True}] * backwards, seen
            assert now() == {False}
            wrapped.zero_grad()


CASES: dict[str, Callable[[int], None]] = {
    "reductions": reductions,
    "divide factor": divide_factor,
    "repnoise, recomputed layers": lambda _: equals_one_process(repnoise, checkpointed),
    "repnoise, groups of its own": lambda _: equals_one_process(repnoise, sharded),
    "repnoise, tied, groups of its own": lambda _: equals_one_process(repnoise, sharded, "llama_tied"),
    "repnoise, parameters in host memory": lambda _: equals_one_process(repnoise, offloaded),
    "language model, adapters on the head": lambda _: equals_one_process(
        language_model,
        lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
        adapted=adapters_on_the_head,
    ),
    "memory": memory,
    "reducing": reducing,
    "flags": flags,
}


def main() -> None:
    rank, store, only = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
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

"""One of two processes that train defenses through trainers and loops: ``distributed_worker.py RANK STORE FOLDER``.

The reference is one process with a plain loop, in which both ranks' batches run as one. ``RepNoiseLoss`` in a trainer
keeps the trainer's convention: there it runs each rank's, at that rank's sample offset, and averages.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import accelerate_loop
import common
import fsdp2
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch.utils.data import SequentialSampler
from trainer import batches
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fastguard import RepNoiseLoss
from fastguard.trainers import MethodMixin, RepNoiseMixin, save, to_huggingface
from tiny import tokenizer
from tiny_models import tiny

STEPS, ACCUMULATE, SIZE, LR = 2, 2, 2, 0.05
TOLERANCE = 1e-6
OPTIONS = {  # SN-Tune: one batch, the same for both; SEAM: what wrapped models take
    "repnoise": ("mask_padding=true", "retain_weight=0"),
    "seam": ("product=difference",),
    "sn_tune": ("samples=2",),
    "rsn_tune": ("samples=2",),
}
UNREAD = ("circuit_breaker",)
"""What these leave without a gradient, wrappers give one of zeros, which weight decay takes for a gradient."""


def make_model(path: str | None = None) -> nn.Module:
    return tiny("llama", torch.float64, num_hidden_layers=2)


common.make_model = fsdp2.make_model = accelerate_loop.make_model = make_model  # no dropout: ranks would differ


class InOrder(common.Pairs):
    """The samples one after the other, as a trainer with a sequential sampler takes them."""

    def _sample(self, place: int) -> dict[str, int]:
        return self.samples[place % len(self.samples)]


def pairs_of(ordered: bool, rank: int) -> common.Pairs:
    return (InOrder if ordered else common.Pairs)(None, None, SIZE, rank, 2)


class Both:
    """Both ranks' batches as one."""

    path = None

    def __init__(self, ordered: bool) -> None:
        self.of = [pairs_of(ordered, rank) for rank in range(2)]

    def __call__(self, n: int) -> dict[str, dict[str, Tensor]]:
        a, b = (pairs(n) for pairs in self.of)
        return {name: {key: torch.cat([a[name][key], b[name][key]]) for key in a[name]} for name in a}


@functools.cache
def reference(defense: str, kind: str) -> dict[str, Tensor]:
    model = make_model()
    ordered = kind == "trainer"
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, LR) if ordered else torch.optim.AdamW(parameters, 1e-3)
    scheduler = (
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=5) if kind == "fsdp2" else None
    )
    passes = reference_passes(defense, model, ordered)
    for step in range(STEPS):
        for i in range(ACCUMULATE):
            passes(step * ACCUMULATE + i)
        for p in parameters if defense in UNREAD else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if kind == "accelerate":
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def reference_passes(defense: str, model: nn.Module, ordered: bool) -> Callable[[int], Any]:
    if defense != "repnoise" or not ordered:
        _, together = common.make_defense(defense, model, Both(ordered), OPTIONS.get(defense, ()))
        return lambda n: together(model, 1 / ACCUMULATE)
    loss_fn = RepNoiseLoss(model, mask_padding=True)
    ranks = [pairs_of(ordered, rank) for rank in range(2)]

    def averaged(n: int) -> None:
        for rank in range(2):
            loss_fn.call.fill_(n)
            (loss_fn(**ranks[rank](n), sample_offset=rank * SIZE, model=model) / (2 * ACCUMULATE)).backward()

    return averaged


# the routes -----------------------------------------------------------------------------------------------------------


def offer_fsdp_on_cpu() -> None:
    """accelerate runs FSDP on accelerators alone; a test may run it on CPU."""
    made = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            for shared in (PartialState._shared_state, AcceleratorState._shared_state):
                shared["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


FSDP = {
    "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "reshard_after_forward": True,
}  # fmt: skip


def through_trainer(base: type, sharded: bool, defense: str, rank: int, folder: Path) -> nn.Module:
    model = make_model()
    pairs = pairs_of(True, rank)
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=SIZE, learning_rate=LR, optim="sgd",
        gradient_accumulation_steps=ACCUMULATE, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, remove_unused_columns=False, disable_tqdm=True,
        weight_decay=0.0, bf16=False,  # which TRL sets otherwise
    )  # fmt: skip
    if sharded:
        settings |= {"fsdp": True, "fsdp_config": FSDP}
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(pairs.samples), "data_collator": pairs.collate}
    if base is SFTTrainer:
        config: Any = SFTConfig(
            **settings, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, gradient_checkpointing=sharded,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        given["processing_class"] = tokenizer()
    else:
        config = TrainingArguments(**settings)
    mixin: type = MethodMixin
    if defense == "repnoise":
        mixin, given["loss_fn"] = RepNoiseMixin, RepNoiseLoss(model, mask_padding=True)
    else:
        given["method"], _ = common.make_defense(defense, model, pairs, OPTIONS.get(defense, ()))
        given["data_collator"] = lambda samples: batches(given["method"].roles, pairs.collate(samples))
        given["sources"] = common.streams(pairs, given["method"].roles)
    if defense == "tar":
        given["data_collator"] = tar_batch(pairs.collate)
        given["sources"] = {"harmful": lambda n: pairs(n)["harmful"], "retain": lambda n: pairs(n)["harmless"]}

    class InOrderTrainer(mixin, base):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    trainer = InOrderTrainer(model, config, **given)
    trainer.train()
    if sharded:
        assert trainer.is_fsdp_enabled
    assert trainer.state.global_step == STEPS
    return trainer.model_wrapped


def tar_batch(collate: Callable) -> Callable:
    def collated(samples: list[dict[str, int]]) -> dict[str, Any]:
        made = collate(samples)
        return {"retain": made["harmless"], "tamper": made["harmful"]}

    return collated


def through_accelerate(sharded: bool, defense: str, rank: int, folder: Path) -> nn.Module:
    plugin = None
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    kind = accelerator.distributed_type
    assert kind == (DistributedType.FSDP if sharded else DistributedType.MULTI_CPU), kind
    return accelerate_loop.train(loop_arguments(defense, folder), accelerator)


def through_fsdp2(defense: str, rank: int, folder: Path) -> nn.Module:
    return fsdp2.train(loop_arguments(defense, folder))


def through_fsdp2_late(defense: str, rank: int, folder: Path) -> nn.Module:
    """The defense is constructed on the sharded model, as where the whole fits on no host."""
    made, shard = fsdp2.make_defense, fsdp2.shard
    fsdp2.make_defense = lambda name, model, pairs, given=(): made(name, shard(model, pairs.device), pairs, given)
    fsdp2.shard = lambda model, device: model
    try:
        return through_fsdp2(defense, rank, folder)
    finally:
        fsdp2.make_defense, fsdp2.shard = made, shard


def loop_arguments(defense: str, folder: Path) -> Any:
    given = ["--out", str(folder), "--defense", defense, "--steps", str(STEPS), "--accumulate", str(ACCUMULATE)]
    for option in OPTIONS.get(defense, ()):
        given += ["--set", option]
    return fsdp2.arguments([*given, "--batch", str(SIZE), "--save-every", "100"])


ROUTES: dict[str, tuple[str, Callable[[str, int, Path], nn.Module]]] = {
    "Trainer, DDP": ("trainer", functools.partial(through_trainer, Trainer, False)),
    "Trainer, FSDP2": ("trainer", functools.partial(through_trainer, Trainer, True)),
    "SFTTrainer, DDP": ("trainer", functools.partial(through_trainer, SFTTrainer, False)),
    "SFTTrainer, FSDP2": ("trainer", functools.partial(through_trainer, SFTTrainer, True)),
    "accelerate, DDP": ("accelerate", functools.partial(through_accelerate, False)),
    "accelerate, FSDP2": ("accelerate", functools.partial(through_accelerate, True)),
    "plain FSDP2": ("fsdp2", through_fsdp2),
}
EVERYTHING = (
    "Trainer, DDP",
    "plain FSDP2",
)  # elsewhere one of each kind of pass: loss, attack, perturbation, activations
KINDS = ("repnoise", "tar", "booster", "t_vaccine")
CASES = [f"{route}, {d}" for route in ROUTES for d in (common.DEFENSES if route in EVERYTHING else KINDS)]
ROUTES["plain FSDP2 first"] = ("fsdp2", through_fsdp2_late)
CASES.append("plain FSDP2 first, tar")
CASES.append(SHARDS := "shards to a folder")


def shards_to_a_folder(rank: int, folder: Path) -> None:
    """What two ranks have saved, one process makes a Hugging Face folder of; some tensors do not divide evenly."""
    model = fsdp2.shard(tiny("llama", num_hidden_layers=2, intermediate_size=41), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    step = save(folder / "run", 1, model, optimizer)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "checkpoint-1" / "pytorch_model_fsdp_0")
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    if rank == 0:
        for checkpoint in (step, folder / "checkpoint-1"):
            done = to_huggingface(checkpoint, model.config, folder / "hf", overwrite=True)
            found = type(tiny("llama")).from_pretrained(done.folder).state_dict()
            assert found.keys() == whole.keys()
            for name, value in whole.items():
                assert torch.equal(found[name], value), name
    dist.barrier()


def run(route: str, defense: str, rank: int, folder: Path) -> None:
    kind, through = ROUTES[route]
    expected = reference(defense, kind)
    before = {name: p.detach() for name, p in make_model().named_parameters()}
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    model = through(defense, rank, folder)
    found = {
        name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p
        for name, p in model.named_parameters()
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error, moved = (found[name] - value).norm(), (value - before[name]).norm()
        assert error <= TOLERANCE * moved + 1e-15, f"{name}: {error:.3e} > {TOLERANCE:g} x {moved:.3e}"


def main() -> None:
    rank, store, folder, only = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    chosen = [case for case in CASES if not only or any(case.startswith(o) or case.endswith(o) for o in only)]
    for route, _, defense in (case.rpartition(", ") for case in chosen if case != SHARDS):
        reference(defense, ROUTES[route][0])  # before this is one process of several, whose batches are one
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    offer_fsdp_on_cpu()
    for case in chosen:
        route, _, defense = case.rpartition(", ")
        environment = dict(os.environ)  # TrainingArguments write to it
        try:
            if case == SHARDS:
                shards_to_a_folder(rank, folder / "shards")
            else:
                run(route, defense, rank, folder / case.replace(", ", "-"))
        except BaseException as error:
            error.add_note(f"case: {case}")
            raise
        os.environ.clear()
        os.environ.update(environment)
        print(f"passed: {case}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

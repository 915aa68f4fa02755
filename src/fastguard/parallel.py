"""Several processes as one run: ``torchrun --nproc-per-node 8 -m fastguard immunize CONFIG`` or ``srun python -m ...``.

Every process goes through the same stages. The model is sharded as it is loaded, by transformers: FSDP2 over the data
ranks, in groups of ``tensor`` ranks that share each matrix. No process ever holds it: shards are read from safetensors,
and written to them, slice by slice. What is one for all of them (records, locks, folders) the first process does, and
the others learn what came of it, be it an error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastguard.machine import distributed, rank, ranks, sync_folder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastguard.run.config import ParallelConfig

T = TypeVar("T")

FILE = 5 * 2**30
"""Bytes of a file of an exported model; a single tensor may be larger. The first process holds two files at a time."""

SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
"""What torchrun sets, and srun sets instead."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun or srun started; alone, it stays so.

    Raises ValueError where srun started several and nobody says where they meet (``MASTER_ADDR``, ``MASTER_PORT``).
    """
    if "RANK" not in os.environ and int(os.environ.get(SLURM["WORLD_SIZE"], "1")) > 1:
        os.environ |= {ours: os.environ[its] for ours, its in SLURM.items()}
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed():
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: expected in the environment of {os.environ['WORLD_SIZE']} processes; start them "
            "with torchrun, or see examples/70b for srun"
        )
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Plain values go over gloo: they are no work for a GPU, and must not wait for one.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


def agreed(work: Callable[[], T]) -> T:
    """What the first process finds by ``work``, plain values, on all of them; or what it raised."""
    if ranks() == 1:
        return work()
    import torch

    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    found: T = box[0]
    return found


def everyone(value: T) -> list[T]:
    """Each process's ``value``, by rank."""
    if ranks() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * ranks()
    torch.distributed.all_gather_object(found, value)
    return found


def first_of(value: float) -> float:
    """The first process's ``value``, on all of them: clocks differ."""
    if ranks() == 1:
        return value
    import torch

    given = torch.tensor(value, dtype=torch.float64)
    torch.distributed.broadcast(given, 0)
    return float(given)


def load_model(
    source: str, dtype: torch.dtype, layout: ParallelConfig, products: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a folder, sharded over all processes, in evaluation mode; each reads its own slices.

    products: in which it multiplies; gradients are reduced in fp32. None, or bfloat16.

    Raises:
        FileNotFoundError, ValueError: as `fastguard.models.load_model`; a layout that the model has no plan for.
        ImportError: transformers is too old to shard a model.
    """
    from transformers import AutoModelForCausalLM

    from fastguard.models import named_errors, refuse_missing

    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ImportError(
            f"several processes: expected a transformers that shards models as it loads them, like 5.23 ({error})"
        ) from None
    tensor, replicas = layout.tensor, layout.replicas
    if ranks() % (tensor * replicas):
        raise ValueError(
            f"parallel: expected tensor x replicas to divide the {ranks()} processes, got tensor {tensor} and replicas "
            f"{replicas}"
        )
    plan = DistributedConfig(
        tp_size=tensor, dp_replicate_size=replicas, fsdp_size=ranks() // (tensor * replicas),
        fsdp_mixed_precision=products is not None,
    )  # fmt: skip
    with named_errors(source, "model"):
        both: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, distributed_config=plan, output_loading_info=True
        )
    model: PreTrainedModel = both[0]
    refuse_missing(model, source, both[1])
    _refuse_torn(model, source)
    model.eval()
    if layout.checkpointing is not False:
        checkpoint_layers(model)
    return model


def _refuse_torn(model: PreTrainedModel, source: str) -> None:
    """Raise a ValueError for a tied head that its ranks would update in part only.

    Where the vocabulary leaves a rest, FSDP2 pads the shards of the embedding and of the head apart: they are tied no
    more, and the head keeps its first weights in the padded part (torch 2.13, transformers 5.23).
    """
    rows = len(next(model.get_input_embeddings().parameters()))
    if getattr(model, "all_tied_weights_keys", None) and rows % ranks():
        raise ValueError(
            f"model.name: {source!r} ties its head to an embedding of {rows} rows, which {ranks()} processes cannot "
            "share evenly; expected a number of processes that divides it"
        )


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Have layers recompute their activations in the backward, in evaluation mode too.

    transformers does so in training mode alone, by the flag of the layer, which nothing else in it reads.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.activation_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


@contextlib.contextmanager
def compiled_layers(layers: Sequence[nn.Module], backend: str = "inductor") -> Iterator[None]:
    """Inside, the forward of each layer is compiled: what a method and FSDP2 have hung on the layer stays around it.

    Hooks that come later are seen and compiled anew. Layers share one program where they are alike; taps inside them
    make them differ, so that torch's limit of programs holds for each.
    """
    import torch
    import torch._dynamo

    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend=backend)
        limit = torch._dynamo.config.recompile_limit * len(layers)
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=limit):
            yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a sharded model as a folder that ``from_pretrained`` loads, whole or not at all; called by all processes.

    Each writes its own shards, of which the first then makes the files, two at a time (`FILE`).
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from fastguard.trainers.checkpoint import contiguous

    def begin() -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))

    def finish() -> None:
        shutil.rmtree(temporary / "sharded")
        _write_settings(model, tokenizer, temporary)
        temporary.chmod(0o755)  # mkdtemp is private
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync_folder(folder.parent)

    temporary = agreed(begin)
    try:
        tensors = _stored(model)
        files = _files(tensors)
        writer = HuggingFaceStorageWriter(
            str(temporary), files, save_distributed=True, enable_consolidation=True, thread_count_consolidation=2
        )
        dcp.save({name: contiguous(t) for name, t in tensors.items()}, storage_writer=writer)
        agreed(finish)
    finally:
        agreed(lambda: shutil.rmtree(temporary, ignore_errors=True))


def _stored(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of ``model`` has; of tied ones the first."""
    from fastguard.taps.structure import reshard

    reshard(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: t.detach() for name, t in model.state_dict().items() if name not in tied}


def _files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number of the file, from 1, of each tensor, in order."""
    found: dict[str, int] = {}
    number, size = 1, 0
    for name, t in tensors.items():
        its = t.numel() * t.element_size()
        if size and size + its > FILE:
            number, size = number + 1, 0
        found[name], size = number, size + its
    return found


def _write_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Configurations and tokenizer beside the weights."""
    import copy

    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if hasattr(config, "distributed_config"):
        del config.distributed_config
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

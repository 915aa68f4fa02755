"""A training checkpoint as a folder that ``from_pretrained`` loads: in one process, on a CPU, whoever wrote it.

    to_huggingface("runs/tar/step-00000750", "meta-llama/Llama-3.1-8B", "released", dtype=torch.bfloat16)

Shards are put together by torch.distributed.checkpoint, whose files say which part of a tensor they hold; how many
ranks wrote them does not matter. Tensors are read in portions, so that the peak is the model plus `PORTION`.

Reading such a checkpoint unpickles its ``.metadata``: convert only what you trust.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastguard import models
from fastguard.nested.adversary import LoRAAdversary
from fastguard.trainers.checkpoint import POINTER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PORTION = 2**31
"""Bytes that are read at a time."""

SHARDS = "pytorch_model_fsdp_0"
"""Where accelerate, and so HF ``Trainer``, keeps FSDP's shards in a checkpoint."""

WHOLE = "pytorch_model_fsdp.bin"
"""Where it keeps an FSDP model that it gathered."""

ADVERSARY = re.compile(rf"\.lora_[^.]+\.{LoRAAdversary.NAME}\.")
"""A simulated attacker's adapters (``nested.LoRAAdversary``), which are no part of the defender's model."""

PREFIXES = ("model.", "", "state_dict.", "module.", "model.module.")
"""What may stand before a parameter's name: ours and accelerate's first."""

WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

BESIDE = re.compile(r"(optim|optimizer|lr_scheduler|scheduler|dataloader|train_state|rank[ .]|step|rng|epoch|loss)")
"""What a checkpoint holds besides a model."""


@dataclass(frozen=True)
class Converted:
    """What `to_huggingface` has written.

    Attributes:
        folder: where. kind: of checkpoint. dtype: of the tensors. tokenizer: whether one was found and is there.
        read: tensors that came from the checkpoint. kept: parameters that it does not hold, which are the base model's.
    """

    folder: Path
    kind: str
    dtype: torch.dtype
    read: int
    kept: int
    tokenizer: bool

    def __str__(self) -> str:
        kept = f", {self.kept} from the base model" if self.kept else ""
        beside = "with" if self.tokenizer else "without"
        return (
            f"{self.folder}: {self.read} tensors of a {self.kind}{kept}, in {str(self.dtype).removeprefix('torch.')}, "
            f"{beside} a tokenizer"
        )


def to_huggingface(
    checkpoint: str | Path,
    model: Any,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    merge: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Write ``checkpoint``, and a tokenizer if one is found, to the folder ``out``, which appears whole or not at all.

    Args:
        checkpoint: one of

            * ours: a run's folder (its latest step) or one ``step-N`` of it;
            * an HF ``Trainer`` checkpoint: of the whole model, of PEFT adapters, or of FSDP (sharded or gathered);
            * a folder that torch.distributed.checkpoint wrote, of a model's ``state_dict()``, alone or under ``model``.

        model: the model that the run began with: a folder, the id of a Hugging Face model or ``smollm2``, from which
            also come the parameters that were frozen, as our checkpoints do not hold them; a transformers configuration
            where none was; or the model itself, which is written to. With adapters the PEFT model, or a folder with an
            ``adapter_config.json``. None where the checkpoint is a folder that ``from_pretrained`` loads already.
        dtype: of all tensors; None: the widest in which the checkpoint, and the base model where it is needed, are.
        merge: add adapters to their weights and write the whole model; else the adapters alone are written.
        overwrite: replace ``out`` if it is there.

    Raises:
        FileNotFoundError: ``checkpoint`` or ``model`` is not there. FileExistsError: ``out`` is there.
        ValueError: ``checkpoint`` is no checkpoint; it lacks parameters of the model, or has others or of other shapes.
    """
    source, target = _found(Path(checkpoint)), Path(out)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating torch.dtype or None, got {dtype!r}")
    _refuse_target(target, source, model, overwrite)
    tokenizer = _tokenizer(source, model)
    tensors = _tensors(source)
    read = kept = 0
    if tensors is None:
        made, kind = _loaded(str(source)), "Hugging Face checkpoint"
        read = len(made.state_dict())
    else:
        kind = tensors.kind
        made, kept = _skeleton(model, tensors, source)
        read = len(tensors.places)
        _fill(made, tensors, dtype)
    if merge:
        if not hasattr(made, "merge_and_unload"):
            raise ValueError("merge: expected a checkpoint of adapters, and a PEFT model; got a whole model")
        made = made.merge_and_unload()
    dtype = dtype or _widest(t.dtype for t in made.state_dict().values())
    made.to(dtype=dtype)
    models.save_model(made, tokenizer, target)
    return Converted(target, kind, dtype, read, kept, tokenizer is not None)


# the checkpoint -------------------------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of a checkpoint by the names that a model has for them."""

    def __init__(self, folder: Path, kind: str, found: Mapping[str, Any], reader: Any) -> None:
        self.folder, self.kind, self._found, self._reader = folder, kind, found, reader
        self.places: dict[str, str] = {}

    def match(self, names: Mapping[str, str]) -> None:
        """Choose the prefix under which most keys are ``names`` (what a key may be called -> the parameter's name).

        Raises ValueError if others stand there too.
        """
        best: tuple[int, dict[str, str], list[str]] = 0, {}, []
        for prefix in PREFIXES:
            places: dict[str, str] = {}
            others = []
            for key in self._found:
                if not key.startswith(prefix):
                    continue
                if ADVERSARY.search(key):
                    continue
                name = WRAPPERS.sub("", key[len(prefix) :])
                for called in (name, name.removeprefix("module."), name.replace(".base_layer.", ".")):
                    if called in names:
                        places[names[called]] = key
                        break
                else:
                    if prefix or not BESIDE.match(key):
                        others.append(key)
            if len(places) > best[0]:
                best = len(places), places, others
        count, self.places, others = best
        strangers = others if count else sorted(self._found)
        if not strangers:
            return
        adapters = any(".lora_" in key for key in strangers)
        hint = "; pass the PEFT model, or a folder with its adapter_config.json" if adapters else ""
        first = sorted(strangers)[0]
        if not count:
            raise ValueError(f"checkpoint: {self.folder} holds nothing of the model; its first key is {first!r}{hint}")
        raise ValueError(
            f"checkpoint: {self.folder} has {len(others)} unexpected keys, of which the model knows nothing, the first "
            f"{first!r}{hint}"
        )

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        entry = self._found[self.places[name]]
        return entry.shape if isinstance(entry, Tensor) else torch.Size(entry.size)

    def dtype(self, name: str) -> torch.dtype:
        """In which it was saved."""
        entry = self._found[self.places[name]]
        found: torch.dtype = entry.dtype if isinstance(entry, Tensor) else entry.properties.dtype
        return found

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, tensor), all of them, a portion at a time."""
        portion: dict[str, Tensor] = {}
        size = 0
        for name in self.places:
            portion[name] = torch.empty(self.shape(name), dtype=self.dtype(name))
            size += portion[name].numel() * portion[name].element_size()
            if size >= PORTION:
                yield from self._load(portion)
                portion, size = {}, 0
        yield from self._load(portion)

    def _load(self, portion: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        import torch.distributed.checkpoint as dcp

        if self._reader is None:
            portion = {name: self._found[self.places[name]] for name in portion}
        elif portion:
            wanted = {self.places[name]: t for name, t in portion.items()}
            with warnings.catch_warnings():  # one process is what is meant
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(wanted, storage_reader=self._reader, no_dist=True)
        yield from portion.items()


def _found(path: Path) -> Path:
    """The folder of one checkpoint."""
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: there is no folder {str(path)!r}")
    pointer = path / POINTER
    if pointer.is_file():
        path = path / pointer.read_text().strip()
        if not path.is_dir():
            raise FileNotFoundError(f"checkpoint: {pointer} names {path.name}, which is not there")
    return path


def _tensors(folder: Path) -> _Tensors | None:
    """What is in a checkpoint; None if ``from_pretrained`` loads it."""
    if (folder / ".metadata").is_file():
        return _sharded(folder, "torch.distributed.checkpoint")
    if (folder / SHARDS / ".metadata").is_file():
        return _sharded(folder / SHARDS, "sharded Trainer checkpoint")
    if (folder / WHOLE).is_file():
        whole = torch.load(folder / WHOLE, map_location="cpu", weights_only=True, mmap=True)
        found = {key: t for key, t in whole.items() if isinstance(t, Tensor)}
        return _Tensors(folder, "gathered Trainer checkpoint", found, None)
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    inside = sorted(p.name for p in folder.iterdir() if re.fullmatch(r"(checkpoint-\d+|step-\d+)", p.name))
    hint = f"; it holds {', '.join(inside)}: name one" if inside else ""
    raise ValueError(
        f"checkpoint: {str(folder)!r} is none: expected a fastguard run or step, a Hugging Face checkpoint "
        f"(config.json or {SHARDS}), or a folder of torch.distributed.checkpoint (.metadata){hint}"
    )


def _sharded(folder: Path, kind: str) -> _Tensors:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    if "rank 0" in entries:
        kind = "fastguard checkpoint"
    found = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return _Tensors(folder, kind, found, reader)


# the model ------------------------------------------------------------------------------------------------------------


def _skeleton(model: Any, tensors: _Tensors, source: Path) -> tuple[Any, int]:
    """The model that the tensors go into, and how many parameters it has from elsewhere; its weights are there only if
    they are needed."""
    from transformers import GenerationConfig

    if isinstance(model, nn.Module):
        made: Any = model
    elif model is None:
        raise ValueError(
            f"model: got None, but {source} holds tensors alone; expected the model that the run began with"
        )
    elif isinstance(model, (str, Path)):
        folder = models.resolve(str(model))
        made = _loaded(folder) if (Path(folder) / "adapter_config.json").is_file() else _empty(_config(folder))
        with contextlib.suppress(OSError):  # of its own; most models have one
            made.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        made = _empty(model)
    tensors.match(_names(made))
    missing = _missing(made, tensors)
    partial = tensors.kind == "fastguard checkpoint" or hasattr(made, "peft_config")
    if missing and partial and isinstance(model, (str, Path)) and _is_empty(made):
        made = _loaded(models.resolve(str(model)))
    elif missing and (_is_empty(made) or not partial):
        hint = (
            "; those that were frozen are not in it: pass the model that the run began with, not its configuration"
            if partial
            else ""
        )
        raise ValueError(
            f"checkpoint: {source} lacks {len(missing)} parameters of the model, the first {missing[0]!r}{hint}"
        )
    if hasattr(made, "peft_config"):
        adapters = [name for name in missing if ".lora_" in name or ".modules_to_save." in name]
        if adapters:
            raise ValueError(f"checkpoint: {source} lacks {len(adapters)} of the adapters, the first {adapters[0]!r}")
    own = dict(made.state_dict())
    for name in tensors.places:
        if own[name].shape != tensors.shape(name):
            raise ValueError(
                f"checkpoint: {tensors.places[name]!r} has shape {tuple(tensors.shape(name))}, but the model's {name} "
                f"{tuple(own[name].shape)}"
            )
    return made, len(missing)


def _names(model: nn.Module) -> dict[str, str]:
    """What a key may be called, and the entry of ``state_dict()`` that it then is."""
    own = {name: name for name in model.state_dict()}
    for adapter in getattr(model, "peft_config", {}):  # PEFT leaves the adapter's name out of what it saves
        for part in (f".modules_to_save.{adapter}.", f".{adapter}."):
            own |= {name.replace(part, ".", 1): name for name in list(own.values()) if part in name}
    return own


def _missing(model: nn.Module, tensors: _Tensors) -> list[str]:
    """Parameters and persistent buffers that the checkpoint holds under none of their names."""
    there = {id(t) for name, t in model.state_dict(keep_vars=True).items() if name in tensors.places}
    return [name for name, t in model.state_dict(keep_vars=True).items() if id(t) not in there]


@torch.no_grad()
def _fill(model: Any, tensors: _Tensors, dtype: torch.dtype | None) -> None:
    """Write the tensors into the model, in ``dtype``, or in the widest that it and they have."""
    own = model.state_dict(keep_vars=True)
    given = {id(own[name]) for name in tensors.places}
    kept = [t.dtype for t in own.values() if id(t) not in given]
    dtype = dtype or _widest([*kept, *(tensors.dtype(name) for name in tensors.places)])
    alike: dict[int, list[str]] = {}
    for name, t in own.items():
        alike.setdefault(id(t), []).append(name)
    done: dict[int, Tensor] = {}
    for name, value in tensors.read():
        old = own[name]
        value = value.to(dtype) if value.is_floating_point() else value
        if id(old) in done:
            if not torch.equal(done[id(old)], value):
                raise ValueError(
                    f"checkpoint: {name} differs from {' and '.join(n for n in alike[id(old)] if n != name)}, but the "
                    "model ties them; pass a configuration with tie_word_embeddings=False"
                )
            continue
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        done[id(old)] = new
        for tied in alike[id(old)]:
            holder, _, last = tied.rpartition(".")
            module = model.get_submodule(holder)
            (module._parameters if last in module._parameters else module._buffers)[last] = new


def _is_empty(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def _empty(config: Any) -> Any:
    """The architecture without memory for its weights."""
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"model: expected a folder, an id, a transformers configuration or a model, got {type(config).__name__}"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _config(source: str) -> Any:
    from transformers import AutoConfig

    with models.named_errors(source, "configuration"):
        return AutoConfig.from_pretrained(source)


def _loaded(source: str) -> Any:
    """The model of a Hugging Face folder or id, in the dtype that it is saved in; adapters on their base."""
    from transformers import AutoModelForCausalLM

    with models.named_errors(source, "model"):
        if (Path(source) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(source, dtype="auto", is_trainable=True)
        both: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    if missing := sorted(both[1]["missing_keys"]):
        raise ValueError(f"model.name: {source!r} lacks {len(missing)} parameters, the first {missing[0]!r}")
    return both[0]


def _tokenizer(source: Path, model: Any) -> PreTrainedTokenizerBase | None:
    """That of the checkpoint, else that of the model."""
    from transformers import AutoTokenizer

    places = [str(source), str(source.parent)]
    if isinstance(model, (str, Path)):
        places.append(models.resolve(str(model)))
    for place in places:
        if any(p.name.startswith(("tokenizer", "vocab")) for p in Path(place).glob("*")):
            with models.named_errors(place, "tokenizer"):
                found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
            return found
    if isinstance(model, (str, Path)) and not Path(place).is_dir():  # an id
        with contextlib.suppress(OSError, ValueError):
            return AutoTokenizer.from_pretrained(place)  # type: ignore[no-any-return]
    return None


# ----------------------------------------------------------------------------------------------------------------------


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    floating = [d for d in dtypes if d.is_floating_point]
    wide = floating[0] if floating else torch.float32
    for d in floating:
        wide = torch.promote_types(wide, d)
    return wide


def _refuse_target(target: Path, source: Path, model: Any, overwrite: bool) -> None:
    """``out`` is replaced as a whole: it must not hold what is read, nor be anything of worth."""
    replaceable = target.is_dir() and (overwrite or not any(target.iterdir()))
    if target.exists() and not replaceable:
        raise FileExistsError(f"out: {str(target)!r} is there; overwrite=True replaces a folder")
    read = [source, *([Path(model)] if isinstance(model, (str, Path)) else [])]
    for place in read:
        if place.exists() and (target.resolve() == place.resolve() or target.resolve() in place.resolve().parents):
            raise ValueError(f"out: {str(target)!r} is, or holds, {str(place)!r}, which is read")

"""SafeLoRA on a PEFT adapter's folder, as published: lora_B becomes C lora_B, and nothing of the model is written.

With C B = V (V^T B) / ||V||_F and the cosine from matrices [r, r] the work is 4 d_out d_in r flops a module; neither C
nor a product B A is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard import __version__
from fastguard.edits import card
from fastguard.edits.shards import ADAPTER as WEIGHTS
from fastguard.edits.shards import ADAPTER_CONFIG as CONFIG
from fastguard.edits.shards import Shard, Stored, as_tensor, header, read_bytes
from fastguard.edits.stream import RECORD, Beside, Streamed
from fastguard.machine import write_json
from fastguard.merging.apply import VERSION, Merged
from fastguard.merging.arithmetic import store
from fastguard.merging.inputs import opened
from fastguard.merging.options import SafeLora
from fastguard.merging.safe_lora import chosen, factor_cosine, projection
from fastguard.progress import Progress, silent

PREFIX, FIRST, SECOND = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
UNREAD = ("fan_in_fan_out", "use_dora")
"""Settings under which lora_B A is not what is added to a weight [d_out, d_in]."""


def safe_lora_adapter(
    adapter: str | Path, out: str | Path, aligned: str | Path, base: str | Path, options: SafeLora | None = None, *,
    overwrite: bool = False, progress: Progress = silent,
) -> Merged:  # fmt: skip
    """Write ``out``, the adapter with lora_B projected in the modules that ``options`` choose.

    Args:
        adapter: the folder of a LoRA adapter (safetensors) that was trained on ``aligned``.
        out: the folder; it appears whole or not at all.
        aligned, base: the models after and before alignment: folders or Hub ids.
        options: `SafeLora`.
        overwrite: replace ``out`` if it is there.
        progress: called with ("compare", share of modules, module).

    Raises:
        ValueError: no such adapter, or one of another kind; models that lack a module's weight or have it in another
            shape; what `projection` refuses; ``out`` is, or holds, a folder that is read.
        FileExistsError: ``out`` is there.
    """
    options, source, target = options or SafeLora(), Path(adapter), Path(out)
    read = {role: opened(role, model) for role, model in (("aligned", aligned), ("base", base))}
    for path in (source, *(b.folder.path for b in read.values())):
        if target.resolve() == path.resolve() or target.resolve() in path.resolve().parents:
            raise ValueError(f"out: {str(target)!r} is, or holds, {str(path)!r}, which is read")
    if target.exists() and not (target.is_dir() and (overwrite or not any(target.iterdir()))):
        raise FileExistsError(f"out: {str(target)!r} is there; overwrite=True replaces it")
    _check(source)
    shard = Shard.open(source / WEIGHTS)
    buffers, digest = _buffers(shard)
    tensors = {t.name: as_tensor(t, buffers[t.name]) for t in shard.tensors}
    digests = {role: hashlib.sha256() for role in read}
    projected, cosines = _compare(tensors, read, options, digests, progress)
    names = chosen(cosines, options)
    for name in names:
        store(tensors[name + SECOND], projected[name])
    record: dict[str, Any] = {
        "format": 1, "fastguard": __version__,
        "edit": {"name": "safe_lora", "options": {**options.to_dict(), "version": VERSION}, "tensors": names},
        "source": str(adapter), "beside": {role: b.called for role, b in read.items()}, "complete": True,
        "shards": {WEIGHTS: {
            "sha256": digest, "beside": {role: d.hexdigest() for role, d in digests.items()},
            "cosines": cosines,
        }},
    }  # fmt: skip
    written = _save(source, target, shard, buffers, record)
    return Merged(Streamed(target, 1, 0, len(names), written), cosines, tuple(names))


def _check(source: Path) -> None:
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {str(source)!r} has no {CONFIG} that can be read: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"model: expected a LoRA adapter in {str(source)!r}, got {config.get('peft_type')!r}")
    for key in UNREAD:
        if config.get(key):
            raise ValueError(f"model: {str(source)!r} has {key}, with which safe_lora does not read it")
    if not (source / WEIGHTS).is_file():
        raise ValueError(f"model: the folder {str(source)!r} has no {WEIGHTS}")


def _buffers(shard: Shard) -> tuple[dict[str, bytearray], str]:
    digest = hashlib.sha256()
    found = {}
    with open(shard.path, "rb") as file:
        for t in shard.tensors:
            found[t.name] = read_bytes(file, t)
            digest.update(found[t.name])
    return found, digest.hexdigest()


def _compare(
    tensors: Mapping[str, Tensor], read: Mapping[str, Beside], options: SafeLora, digests: Mapping[str, Any],
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """By module C B, and the cosine between C B A and B A."""
    modules = [name.removesuffix(SECOND) for name in tensors if name.endswith(SECOND)]
    modules = [m for m in modules if not options.modules or any(part in m for part in options.modules)]
    if not modules:
        raise ValueError(f"modules: expected some of the adapter's, got {options.modules}, which no {SECOND} meets")
    projected, cosines = {}, {}
    for count, module in enumerate(modules):
        first, second = tensors[module + FIRST], tensors[module + SECOND]
        shape = len(second), first.shape[1]
        safe, base = (_weight(role, b, module, shape, digests[role]) for role, b in read.items())
        dtype = torch.float64 if torch.float64 in (safe.dtype, base.dtype, second.dtype) else torch.float32
        project = projection(safe.to(dtype) - base.to(dtype), options, module)
        if project is not None and second.any():
            projected[module] = project(second.to(dtype))
            cosines[module] = factor_cosine(projected[module], second.to(dtype), first.to(dtype))
        progress("compare", (count + 1) / len(modules), module)
    return projected, cosines


def _weight(role: str, model: Beside, module: str, shape: tuple[int, int], digest: Any) -> Tensor:
    name = module.removeprefix(PREFIX) + ".weight"
    stored = model.folder.tensors.get(name)
    if stored is None or stored.shape != shape:
        has = "no such tensor" if stored is None else f"one of {list(stored.shape)}"
        raise ValueError(f"{role}: expected {name!r} of {list(shape)} for the adapter, {model.called!r} has {has}")
    raw = model.folder.read_bytes(name)
    digest.update(raw)
    return as_tensor(stored, raw)


def _save(source: Path, target: Path, shard: Shard, buffers: Mapping[str, bytearray], record: dict[str, Any]) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    plan: list[tuple[str, Stored]] = [(t.name, t) for t in shard.tensors]
    try:
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.name not in (WEIGHTS, RECORD, card.FILE):
                shutil.copyfile(path, temporary / path.name)
        with open(temporary / WEIGHTS, "wb") as file:
            file.write(header(plan, shard.metadata or {"format": "pt"}))
            for name, _ in plan:
                file.write(buffers[name])
            file.flush()
            os.fsync(file.fileno())
        before = source / card.FILE
        text = before.read_text(encoding="utf-8") if before.is_file() else ""
        (temporary / card.FILE).write_text(card.extended(text, record, ["merge"]), encoding="utf-8")
        write_json(temporary / RECORD, record)
        temporary.chmod(0o755)  # mkdtemp is private
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return shard.size

"""Change a model's weights on disk, in the memory of one tensor: a 70B model is edited on a laptop.

    stream("meta-llama/Llama-3.1-70B-Instruct", "edited", Edit("halve", {}, {"lm_head.weight": lambda w: w.mul_(0.5)}))

Shards are read and written tensor by tensor; what no edit names is copied byte for byte. A shard appears whole or not
at all, under its name, when its bytes are on the disk, and ``config.json`` after all of them, so that a folder that
loads is finished. A second call of the same edit on the same source keeps the shards that are there.

``fastguard_edit.json`` says where the folder comes from: source, its shards' digests, the edit and its options.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from fastguard import __version__, models
from fastguard.edits.shards import INDEX, Folder, Shard, Stored, as_tensor, header, read_bytes
from fastguard.machine import LOCK, locked, sync_folder, write_atomically, write_json
from fastguard.progress import Progress, silent

RECORD = "fastguard_edit.json"
FORMAT = 1
PORTION = 2**22
"""Bytes that are copied at a time."""

ELSEWHERE = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "onnx/*")
"""The same weights in other formats: neither fetched nor copied."""


@dataclass(frozen=True)
class Edit:
    """What to do to a model's weights.

    Attributes:
        name, options: what it is, for the record, as JSON has it; whatever changes the outcome must be in here, since
            shards of an edit with the same name and options are kept.
        tensors: by name in the file: a function that changes the tensor in place. It must not depend on other calls.
        copies: new name -> name of the tensor whose bytes, **before** its edit, it gets.
        config: entries of config.json to set.
    """

    name: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Callable[[Tensor], object]]
    copies: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Everything of it that is not a function."""
        return {
            "name": self.name, "options": dict(self.options), "copies": dict(self.copies), "config": dict(self.config),
            "tensors": sorted(self.tensors),
        }  # fmt: skip


@dataclass(frozen=True)
class Streamed:
    """What was done: the folder, its shards, how many of them were there already, tensors edited, bytes written."""

    folder: Path
    shards: int
    kept: int
    edited: int
    written: int


def source_folder(model: str | Path) -> Folder:
    """The folder of a model: itself, or the Hub's snapshot, fetched if it is not here.

    Raises FileNotFoundError or ValueError where there is none, or it holds no safetensors that can be read.
    """
    found = Path(models.resolve(str(model)))
    if not found.is_dir():
        from huggingface_hub import snapshot_download

        with models.named_errors(str(found), "weights"):
            found = Path(snapshot_download(str(found), ignore_patterns=list(ELSEWHERE)))
    return Folder.open(found)


def stream(
    model: str | Path | Folder, out: str | Path, edit: Edit, *, name: str | None = None, overwrite: bool = False,
    progress: Progress = silent,
) -> Streamed:  # fmt: skip
    """Write ``out``, a folder that ``from_pretrained`` loads: ``model`` with ``edit`` applied.

    Args:
        model: a folder with safetensors, a Hub id, or what `source_folder` gave.
        out: the folder to write; what an interrupted call of the same edit left there is taken up.
        edit: what to do to which tensors.
        name: what the record calls the model; otherwise what was given, or the folder.
        overwrite: delete ``out`` first if it holds something else.
        progress: called with ("edit", the share of bytes done, the shard).

    Raises:
        FileNotFoundError, ValueError: there is no such model; the edit names tensors that it has not, or adds one that
            it has; ``out`` is, or holds, the model.
        FileExistsError: ``out`` holds something else.
        TypeError: a tensor to be edited is stored in 8 bits or less.
        OSError: the disk is too small, or fails.
        RuntimeError: another process writes to ``out``.
    """
    source = model if isinstance(model, Folder) else source_folder(model)
    target = Path(out)
    _check(source, edit)
    record = _record(name or str(source.path if isinstance(model, Folder) else model), edit)
    _refuse(source, target, record, overwrite)
    with locked(target):
        return _stream(source, target, edit, record, progress)


def _stream(source: Folder, target: Path, edit: Edit, record: dict[str, Any], progress: Progress) -> Streamed:
    done = _begin(source, target, record)
    sizes = {shard.path.name: shard.size + _added(shard, edit) for shard in source.shards}
    total, behind = max(sum(sizes.values()), 1), 0
    kept = written = 0
    _room(target, sum(size for file, size in sizes.items() if file not in done))
    for shard in source.shards:
        file = shard.path.name

        def told(count: int, file: str = file, behind: int = behind) -> None:
            progress("edit", min((behind + count) / total, 0.999), file)

        if file in done:
            kept += 1
        else:
            told(0)
            digest = _write_shard(shard, target / file, edit, told)
            record["shards"][file] = {
                "source": _identity(shard), "sha256": digest, "bytes": (target / file).stat().st_size
            }  # fmt: skip
            write_json(target / RECORD, record)
            written += sizes[file]
        behind += sizes[file]
    _write_rest(source, target, edit)
    record["complete"] = True
    write_json(target / RECORD, record)
    progress("edit", 1.0, f"{len(edit.tensors)} of {len(source.tensors)} tensors in {len(source.shards)} shards")
    return Streamed(target, len(source.shards), kept, len(edit.tensors), written)


# ----------------------------------------------------------------------------------------------------------------------


def _check(source: Folder, edit: Edit) -> None:
    there = source.tensors
    absent = [name for name in (*edit.tensors, *edit.copies.values()) if name not in there]
    if absent:
        raise ValueError(f"edit: names {len(absent)} tensors that {source.path} has not, the first {absent[0]!r}")
    doubled = [name for name in edit.copies if name in there]
    if doubled:
        raise ValueError(f"edit: adds {doubled[0]!r}, which {source.path} has already")
    for name in edit.tensors:
        as_tensor(Stored(name, there[name].dtype, (0,), 0, 0), bytearray())


def _record(name: str, edit: Edit) -> dict[str, Any]:
    described = edit.described()
    key = hashlib.sha256(json.dumps([FORMAT, described], sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT, "fastguard": __version__, "key": key, "edit": described, "source": name, "complete": False,
        "shards": {},
    }  # fmt: skip


def _refuse(source: Folder, target: Path, record: dict[str, Any], overwrite: bool) -> None:
    """What ``target`` must not be."""
    if target.resolve() == source.path.resolve() or target.resolve() in source.path.resolve().parents:
        raise ValueError(f"out: {str(target)!r} is, or holds, {str(source.path)!r}, which is read")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"out: {str(target)!r} is a file; expected a folder")
    if not overwrite and _holds(target) and _before(target).get("key") != record["key"]:
        what = "another edit" if _before(target) else "something else"
        raise FileExistsError(f"out: {str(target)!r} holds {what}; overwrite=True replaces it")


def _holds(target: Path) -> list[Path]:
    return [path for path in target.iterdir() if path.name != LOCK] if target.is_dir() else []


def _begin(source: Folder, target: Path, record: dict[str, Any]) -> set[str]:
    """Make ``target`` ready; the shards that are there already, and put into the record."""
    before = _before(target)
    if before.get("key") != record["key"]:
        for path in _holds(target):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        before = {}
    done = set()
    for shard in source.shards:
        name = shard.path.name
        entry, file = before.get("shards", {}).get(name), target / name
        fits = entry is not None and entry["source"] == _identity(shard)
        if fits and file.is_file() and file.stat().st_size == entry["bytes"]:
            done.add(name)
            record["shards"][name] = entry
    if len(done) < len(source.shards):
        (target / "config.json").unlink(missing_ok=True)  # no longer a model
    for partial in target.glob("*.partial"):
        partial.unlink()
    write_json(target / RECORD, record)
    return done


def _before(target: Path) -> dict[str, Any]:
    try:
        found = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _identity(shard: Shard) -> str:
    """Tells a shard that was replaced, without reading it: name, size, time of change, tensors."""
    status = shard.path.stat()
    known = [shard.path.name, status.st_size, status.st_mtime_ns, [(t.name, t.dtype, t.shape) for t in shard.tensors]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _added(shard: Shard, edit: Edit) -> int:
    return sum(t.size for t in shard.tensors if t.name in edit.copies.values())


def _room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise OSError(f"out: {target} has {free / 2**30:.1f} GiB free, but {needed / 2**30:.1f} GiB are to be written")


def _write_shard(shard: Shard, target: Path, edit: Edit, told: Callable[[int], None]) -> str:
    """Write one shard; the SHA-256 of its tensors' bytes as they were."""
    copies: dict[str, list[str]] = {}
    for new, old in edit.copies.items():
        copies.setdefault(old, []).append(new)
    # A copy stands before what it is a copy of, so that the tensor can then be edited where it is.
    plan = [(name, t) for t in shard.tensors for name in (*copies.get(t.name, ()), t.name)]
    digest, count = hashlib.sha256(), 0
    partial = target.with_name(target.name + ".partial")
    try:
        with open(shard.path, "rb") as source, open(partial, "wb") as out:
            out.write(header(plan, shard.metadata or {"format": "pt"}))
            for t in shard.tensors:
                change = edit.tensors.get(t.name)
                if change is None and t.name not in copies:
                    _copy(source, out, t, digest)
                else:
                    buffer = read_bytes(source, t)
                    digest.update(buffer)
                    for _ in copies.get(t.name, ()):
                        out.write(buffer)
                        count += t.size
                    if change is not None:
                        change(as_tensor(t, buffer))
                    out.write(buffer)
                    del buffer  # before the next one is read
                count += t.size
                told(count)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(target.parent)
    return digest.hexdigest()


def _copy(source: BinaryIO, out: BinaryIO, stored: Stored, digest: Any) -> None:
    source.seek(stored.start)
    left = stored.size
    while left:
        portion = source.read(min(left, PORTION))
        if not portion:
            raise OSError(f"model: {source.name} ends within {stored.name}")
        digest.update(portion)
        out.write(portion)
        left -= len(portion)


def _write_rest(source: Folder, target: Path, edit: Edit) -> None:
    """Everything that is not a shard: tokenizer, templates, index; the configuration last."""
    shards = {shard.path.name for shard in source.shards}
    own = {*shards, INDEX, "config.json", RECORD}
    for path in sorted(source.path.iterdir()):
        name = path.name
        if name in own or name.startswith(".") or name.endswith((".safetensors", *(p[1:] for p in ELSEWHERE[:7]))):
            continue
        if path.is_file() and not name.endswith(".safetensors.index.json"):
            write_atomically(target / name, path.read_bytes())
        elif path.is_dir() and name == "additional_chat_templates":
            for template in sorted(path.glob("*.jinja")):
                write_atomically(target / name / template.name, template.read_bytes())
    if source.index is not None:
        places = {t.name: shard.path.name for shard in source.shards for t in shard.tensors}
        places |= {new: places[old] for new, old in edit.copies.items()}
        sizes = source.tensors
        total = sum(t.size for t in sizes.values()) + sum(sizes[old].size for old in edit.copies.values())
        metadata = {**source.index.get("metadata", {}), "total_size": total}
        write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})
    write_json(target / "config.json", {**source.config, **edit.config})

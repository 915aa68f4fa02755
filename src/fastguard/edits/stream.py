"""Change a model's weights on disk, in the memory of one tensor: a 70B model is edited on a laptop.

    stream("meta-llama/Llama-3.1-70B-Instruct", "edited", Edit("halve", {}, {"lm_head.weight": lambda w: w.mul_(0.5)}))

Shards are read and written tensor by tensor; what no edit names is copied byte for byte. A shard appears whole or not
at all, under its name, when its bytes are on the disk, and ``config.json`` after all of them, so that a folder that
loads is finished. A second call of the same edit on the same source keeps the shards that are there.

An edit may read the same tensors of other folders (`Beside`), however those are sharded: a merge is such an edit.

``fastguard_edit.json`` says where the folder comes from: sources, their shards' digests, the edit and its options. Of
an edit with tags the model's card says it, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from fastguard import __version__, models
from fastguard.edits import card
from fastguard.edits.shards import DTYPES, INDEX, Folder, Shard, Stored, as_tensor, header
from fastguard.machine import LOCK, locked, sync_folder, write_atomically, write_json
from fastguard.progress import Progress, silent

RECORD = "fastguard_edit.json"
FORMAT = 1
PORTION = 2**22
"""Bytes that are copied at a time."""
HASHED = 2**19
"""Bytes that are read at a time and hashed while a cache holds them."""
SYNCED = 2**26
"""Bytes after which the disk is told to begin: it writes while the next tensors are read and edited."""

ELSEWHERE = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "onnx/*")
"""The same weights in other formats: neither fetched nor copied."""


@dataclass(frozen=True)
class Beside:
    """Another folder that an edit reads.

    Attributes:
        folder: what `source_folder` gave.
        called: what the record calls it.
        names: the model's tensor -> what it is called there, where that is something else.
    """

    folder: Folder
    called: str
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Edit:
    """What to do to a model's weights.

    Attributes:
        name, options: what it is, for the record, as JSON has it; whatever changes the outcome must be in here, since
            shards of an edit with the same name and options are kept.
        tensors: by name in the file: a function that changes the tensor in place. It must not depend on other calls,
            nor keep what it is given, whose memory is used again.
        copies: new name -> name of the tensor whose bytes, **before** its edit, it gets.
        config: entries of config.json to set.
        beside: by role: further folders. Each function gets, after the tensor, the same tensor of each of them, in
            their order. A shard is done again when one of them was replaced.
        dtypes: tensors that are written in another dtype (``F32``): their functions return the tensor in it.
        tags: of the model's card; where there are any, it gets a section on the edit.
    """

    name: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Callable[..., object]]
    copies: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Beside] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()

    def described(self) -> dict[str, Any]:
        """Everything of it that is not a function, nor a folder's place."""
        own = {
            "name": self.name, "options": dict(self.options), "copies": dict(self.copies), "config": dict(self.config),
            "tensors": sorted(self.tensors),
        }  # fmt: skip
        if self.beside:
            own |= {"beside": {role: dict(sorted(b.names.items())) for role, b in self.beside.items()}}
        return own | ({"dtypes": dict(sorted(self.dtypes.items()))} if self.dtypes else {})

    def written(self, stored: Stored) -> Stored:
        """The tensor as it is written."""
        dtype = self.dtypes.get(stored.name, stored.dtype)
        if dtype == stored.dtype:
            return stored
        size = stored.size // DTYPES[stored.dtype].itemsize * DTYPES[dtype].itemsize
        return replace(stored, dtype=dtype, size=size)


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
        FileNotFoundError, ValueError: there is no such model; the edit names tensors that it, or a folder beside it,
            has not, or adds one that it has; ``out`` is, or holds, a folder that is read.
        FileExistsError: ``out`` holds something else.
        TypeError: a tensor to be edited is stored in 8 bits or less.
        OSError: the disk is too small, or fails.
        RuntimeError: another process writes to ``out``.
    """
    source = model if isinstance(model, Folder) else source_folder(model)
    target = Path(out)
    _check(source, edit)
    record = _record(name or str(source.path if isinstance(model, Folder) else model), edit)
    for read in (source, *(b.folder for b in edit.beside.values())):
        _refuse(read, target, record, overwrite)
    with locked(target), ThreadPoolExecutor(1 + len(edit.beside)) as pool:
        return _stream(source, target, edit, record, progress, pool)


def _stream(
    source: Folder, target: Path, edit: Edit, record: dict[str, Any], progress: Progress, pool: ThreadPoolExecutor
) -> Streamed:
    identities = _identities(source, edit)
    done = _begin(source, target, record, identities)
    sizes = {shard.path.name: _size(shard, edit) for shard in source.shards}
    readers = [_Reader(source), *(_Reader(b.folder, b.names) for b in edit.beside.values())]
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
            digest, *others = _write_shard(shard, target / file, edit, readers, pool, told)
            record["shards"][file] = {
                "source": identities[file], "sha256": digest, "bytes": (target / file).stat().st_size,
                **({"beside": dict(zip(edit.beside, others, strict=True))} if others else {}),
            }  # fmt: skip
            write_json(target / RECORD, record)
            written += sizes[file]
        behind += sizes[file]
    _write_rest(source, target, edit, record)
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
    for beside in edit.beside.values():
        for name in edit.tensors:
            other = beside.folder.tensors.get(beside.names.get(name, name))
            if other is None or other.shape != there[name].shape:
                what = "no such tensor" if other is None else f"one of {list(other.shape)}"
                raise ValueError(
                    f"edit: names {name!r}, which is {list(there[name].shape)} in {source.path}; {beside.folder.path} "
                    f"has {what}"
                )
            as_tensor(Stored(other.name, other.dtype, (0,), 0, 0), bytearray())


def _record(name: str, edit: Edit) -> dict[str, Any]:
    described = edit.described()
    key = hashlib.sha256(json.dumps([FORMAT, described], sort_keys=True).encode()).hexdigest()
    return {
        "format": FORMAT, "fastguard": __version__, "key": key, "edit": described, "source": name,
        **({"beside": {role: b.called for role, b in edit.beside.items()}} if edit.beside else {}),
        "complete": False, "shards": {},
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


def _begin(source: Folder, target: Path, record: dict[str, Any], identities: Mapping[str, str]) -> set[str]:
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
        fits = entry is not None and entry["source"] == identities[name]
        if fits and file.is_file() and file.stat().st_size == entry["bytes"]:
            done.add(name)
            record["shards"][name] = entry
    if len(done) < len(source.shards):
        (target / source.config_name).unlink(missing_ok=True)  # no longer a model
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


def _identities(source: Folder, edit: Edit) -> dict[str, str]:
    """By shard: what it is made of, its own source and everything beside."""
    beside = [[role, [_identity(shard) for shard in b.folder.shards]] for role, b in edit.beside.items()]
    own = {shard.path.name: _identity(shard) for shard in source.shards}
    if not beside:
        return own
    return {name: hashlib.sha256(json.dumps([one, beside]).encode()).hexdigest() for name, one in own.items()}


def _identity(shard: Shard) -> str:
    """Tells a shard that was replaced, without reading it: name, size, time of change, tensors."""
    status = shard.path.stat()
    known = [shard.path.name, status.st_size, status.st_mtime_ns, [(t.name, t.dtype, t.shape) for t in shard.tensors]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _size(shard: Shard, edit: Edit) -> int:
    """Bytes of what it becomes."""
    copied = [*edit.copies.values()]
    return sum(edit.written(t).size + copied.count(t.name) * t.size for t in shard.tensors)


def _room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise OSError(f"out: {target} has {free / 2**30:.1f} GiB free, but {needed / 2**30:.1f} GiB are to be written")


class _Reader:
    """Reads and hashes a folder's tensors, into memory that the next one uses again: fresh pages cost as much."""

    def __init__(self, folder: Folder, names: Mapping[str, str] | None = None) -> None:
        self.folder, self.names = folder, names or {}
        self.digest = hashlib.sha256()
        self._buffer = bytearray()

    def read(self, name: str) -> Tensor:
        """One tensor, until the next is read."""
        name = self.names.get(name, name)
        stored = self.folder.tensors[name]
        return as_tensor(stored, self.load(name))

    def load(self, name: str) -> memoryview:
        """The same as bytes."""
        stored = self.folder.tensors[name]
        if len(self._buffer) < stored.size:
            self._buffer = bytearray()  # before the larger one is there
            self._buffer = bytearray(stored.size)
        view, done = memoryview(self._buffer)[: stored.size], 0
        with open(self.folder.files[name], "rb", buffering=0) as file:
            file.seek(stored.start)
            while done < stored.size:
                count = file.readinto(view[done : done + HASHED])
                if not count:
                    raise OSError(f"model: {file.name} ends within {name}")
                self.digest.update(view[done : done + count])
                done += count
        return view


def _write_shard(
    shard: Shard, target: Path, edit: Edit, readers: list[_Reader], pool: ThreadPoolExecutor,
    told: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """Write one shard; the SHA-256 of its tensors' bytes as they were, and of those that were read beside them."""
    copies: dict[str, list[str]] = {}
    for new, old in edit.copies.items():
        copies.setdefault(old, []).append(new)
    # A copy stands before what it is a copy of, so that the tensor can then be edited where it is.
    plan = [
        one for t in shard.tensors for one in (*((c, t) for c in copies.get(t.name, ())), (t.name, edit.written(t)))
    ]
    own, *others = readers
    for reader in readers:
        reader.digest = hashlib.sha256()
    count = begun = 0
    syncing: Future[None] | None = None
    partial = target.with_name(target.name + ".partial")
    try:
        with open(shard.path, "rb") as source, open(partial, "wb") as out:
            out.write(header(plan, shard.metadata or {"format": "pt"}))
            for t in shard.tensors:
                change = edit.tensors.get(t.name)
                if change is None and t.name not in copies:
                    _copy(source, out, t, own.digest)
                else:
                    beside = [pool.submit(reader.read, t.name) for reader in others] if change is not None else []
                    view = own.load(t.name)
                    for _ in copies.get(t.name, ()):
                        out.write(view)
                        count += t.size
                    if change is not None:
                        made = change(as_tensor(t, view), *(one.result() for one in beside))
                        view = _converted(t, edit, made) if t.name in edit.dtypes else view
                    out.write(view)
                count += edit.written(t).size
                if count - begun >= SYNCED and (syncing is None or syncing.done()):
                    syncing, begun = pool.submit(os.fsync, out.fileno()), count
                told(count)
            out.flush()
            os.fsync(out.fileno())
            if syncing is not None:
                syncing.result()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(target.parent)
    return [reader.digest.hexdigest() for reader in readers]


def _converted(stored: Stored, edit: Edit, made: object) -> memoryview:
    """The bytes of what a function returned."""
    written = edit.written(stored)
    if not isinstance(made, Tensor) or made.dtype != DTYPES[written.dtype] or tuple(made.shape) != stored.shape:
        raise TypeError(
            f"edit: expected a tensor {list(stored.shape)} of {written.dtype} for {stored.name}, got {made!r}"
        )
    buffer = bytearray(written.size)
    as_tensor(written, buffer).copy_(made)
    return memoryview(buffer)


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


def _write_rest(source: Folder, target: Path, edit: Edit, record: dict[str, Any]) -> None:
    """Everything that is not a shard: tokenizer, templates, index; the configuration last."""
    shards = {shard.path.name for shard in source.shards}
    own = {*shards, INDEX, source.config_name, RECORD}
    for path in sorted(source.path.iterdir()):
        name = path.name
        if name in own or name.startswith(".") or name.endswith((".safetensors", *(p[1:] for p in ELSEWHERE[:7]))):
            continue
        if name == card.FILE and edit.tags:
            continue
        if path.is_file() and not name.endswith(".safetensors.index.json"):
            write_atomically(target / name, path.read_bytes())
        elif path.is_dir() and name == "additional_chat_templates":
            for template in sorted(path.glob("*.jinja")):
                write_atomically(target / name / template.name, template.read_bytes())
    if source.index is not None:
        places = {t.name: shard.path.name for shard in source.shards for t in shard.tensors}
        places |= {new: places[old] for new, old in edit.copies.items()}
        total = sum(_size(shard, edit) for shard in source.shards)
        metadata = {**source.index.get("metadata", {}), "total_size": total}
        write_json(target / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})
    if edit.tags:
        before = source.path / card.FILE
        text = before.read_text(encoding="utf-8") if before.is_file() else ""
        write_atomically(target / card.FILE, card.extended(text, record, edit.tags).encode())
    write_json(target / source.config_name, {**source.config, **edit.config})

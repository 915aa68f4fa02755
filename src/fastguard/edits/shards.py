"""A Hugging Face folder's safetensors shards, read and written tensor by tensor.

The library's own writer wants a shard's tensors all at once. The format is a length, a JSON header and the tensors'
bytes, so that a shard whose shapes are known can be written while another is read, in the memory of one tensor.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""Those that can be computed with; the bytes of others are copied."""

LONGEST = 100_000_000
"""Bytes of a header, as in the library."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its header's entry, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, and its metadata."""

    path: Path
    tensors: tuple[Stored, ...]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header. Raises ValueError where the file is none, or is shorter than its header says."""
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else LONGEST + 1
            raw = file.read(length) if length <= LONGEST else b""
        try:
            header: dict[str, Any] = json.loads(raw)
            metadata = header.pop("__metadata__", {})
            base = 8 + length
            tensors = [
                Stored(name, e["dtype"], tuple(e["shape"]), base + e["data_offsets"][0],
                       e["data_offsets"][1] - e["data_offsets"][0])
                for name, e in header.items()
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"model: {path} is no safetensors file, or half of one: {error}") from None
        tensors.sort(key=lambda t: (t.start, t.size))
        end, size = base + sum(t.size for t in tensors), path.stat().st_size
        if end != size:
            raise ValueError(f"model: {path} has {size} bytes, but its header tells of {end}: is it half of a file?")
        return cls(path, tuple(tensors), metadata)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.size for t in self.tensors)


@dataclass(frozen=True)
class Folder:
    """A model's folder, or a PEFT adapter's: configuration, shards, and which of them holds a tensor."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    config_name: str = CONFIG

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Read configuration, index and headers, no tensor.

        Raises:
            FileNotFoundError: there is no config.json, no safetensors, or not all shards of the index.
            ValueError: adapters; a file that cannot be read.
        """
        if not (path / CONFIG).is_file():
            adapters = " (it holds adapters: merge them first)" if (path / ADAPTER_CONFIG).is_file() else ""
            raise FileNotFoundError(f"model: the folder {str(path)!r} has no config.json{adapters}")
        config = _json(path / CONFIG)
        index = None
        if (path / INDEX).is_file():
            index = _json(path / INDEX)
            names = sorted(set(index.get("weight_map", {}).values()))
        elif (path / SINGLE).is_file():
            names = [SINGLE]
        else:
            names = []
        if not names:
            raise FileNotFoundError(
                f"model: the folder {str(path)!r} has neither {SINGLE} nor {INDEX}; expected weights in safetensors "
                "(load and save_pretrained writes them)"
            )
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"model: the folder {str(path)!r} lacks {len(missing)} shards: {missing[0]}")
        shards = tuple(Shard.open(path / name) for name in names)
        found: dict[str, str] = {}
        for shard in shards:
            for t in shard.tensors:
                if t.name in found:
                    raise ValueError(f"model: {t.name} is in both {found[t.name]} and {shard.path.name}")
                found[t.name] = shard.path.name
        absent = [name for name in (index or {}).get("weight_map", {}) if name not in found]
        if absent:
            raise ValueError(f"model: {INDEX} names {len(absent)} tensors that no shard holds, the first {absent[0]}")
        return cls(path, config, shards, index)

    @classmethod
    def open_adapter(cls, path: Path) -> Folder:
        """The same of a PEFT adapter. Raises FileNotFoundError without its weights, ValueError as above."""
        if not (path / ADAPTER).is_file():
            raise FileNotFoundError(f"model: the folder {str(path)!r} has no {ADAPTER}")
        return cls(path, _json(path / ADAPTER_CONFIG), (Shard.open(path / ADAPTER),), None, ADAPTER_CONFIG)

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """All of them by name."""
        return {t.name: t for shard in self.shards for t in shard.tensors}

    @cached_property
    def files(self) -> dict[str, Path]:
        """By a tensor's name the file that holds it."""
        return {t.name: shard.path for shard in self.shards for t in shard.tensors}

    def read(self, name: str) -> Tensor:
        """One tensor, on memory of its own. Raises KeyError where there is none of that name."""
        return as_tensor(self.tensors[name], self.read_bytes(name))

    def read_bytes(self, name: str) -> bytearray:
        """One tensor's bytes. Raises KeyError where there is none of that name."""
        with open(self.files[name], "rb") as file:
            return read_bytes(file, self.tensors[name])


def is_adapter(model: str | Path) -> bool:
    """Whether this is the folder of a PEFT adapter, and of no whole model."""
    return (Path(model) / ADAPTER_CONFIG).is_file() and not (Path(model) / CONFIG).is_file()


def read_bytes(file: BinaryIO, stored: Stored) -> bytearray:
    """The bytes of a tensor. Raises OSError where the file ends before it."""
    file.seek(stored.start)
    buffer = bytearray(stored.size)
    view, done = memoryview(buffer), 0
    while done < stored.size:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"model: {file.name} ends within {stored.name}")
        done += count
    return buffer


def as_tensor(stored: Stored, buffer: bytearray | memoryview) -> Tensor:
    """A tensor on these bytes: what is written into it is written into them. Raises TypeError for other dtypes."""
    dtype = DTYPES.get(stored.dtype)
    if dtype is None:
        raise TypeError(
            f"model: {stored.name} is stored as {stored.dtype}, expected {', '.join(DTYPES)}; quantised weights are "
            "not edited: dequantise the model first"
        )
    if not stored.size:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(stored.shape)


def header(tensors: list[tuple[str, Stored]], metadata: dict[str, str]) -> bytes:
    """Of a file that holds these tensors under these names in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, t in tensors:
        entries[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.size]}
        at += t.size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"model: {path}: expected a mapping, got {type(value).__name__}")
    return value

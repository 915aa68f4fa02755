"""Stages that leave a record each, so that a run which was killed, or changed, does again only what it has to.

A record appears whole or not at all. It carries a key of all that the stage read: its own settings, the content of its
model and data, the format of records. A stage is taken from its record where the key is the same, and where the model
that it left is still the one that it wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastguard.evaluation.metrics import Stage
from fastguard.machine import locked, peak_memory, write_json
from fastguard.models import model_digest
from fastguard.parallel import agreed, everyone
from fastguard.progress import Progress

FORMAT = 2
"""Of the records; raised where what a stage computes from the same input has changed."""


def key_of(reads: object) -> str:
    """A key of plain values."""
    text = json.dumps({"format": FORMAT, "reads": reads}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def folder_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of a folder's files: enough to see that nobody has touched it."""
    files = sorted(f for f in folder.iterdir() if f.is_file())
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}


class Stages:
    """The stages of one run in a folder.

    Args:
        out: the folder. progress: told of each stage.

    Attributes:
        done: what was done, in order.
    """

    def __init__(self, out: Path, progress: Progress) -> None:
        self.out, self.progress = out, progress
        self.done: list[Stage] = []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else runs in this folder meanwhile. Raises RuntimeError where somebody does."""
        with contextlib.ExitStack() as held:
            agreed(lambda: held.enter_context(locked(self.out)))
            yield

    def run(
        self, name: str, reads: object, work: Callable[[Callable[[float, str], None]], Any], leaves: Path | None = None
    ) -> Any:
        """The result of a stage: from its record, or by doing the work and recording it.

        Args:
            reads: plain values; all that the result depends on.
            work: given a function for progress (fraction, text); returns plain values.
            leaves: a model folder that the stage writes; a record without it, or with another in its place, is void.

        Raises ValueError for a record that cannot be read.
        """
        file, key = self._file(name), key_of(reads)
        before, record = agreed(lambda: self._begin(file, key, leaves))
        resumed = record is not None
        if record is None:
            self.progress(name, 0.0, "")
            start = time.perf_counter()
            result = work(lambda fraction, text: self.progress(name, min(fraction, 0.999), text))
            made = {
                "key": key,
                "result": result,
                "wall_s": time.perf_counter() - start,
                "peak_memory_bytes": max(everyone(peak_memory())),
            }
            record = agreed(lambda: self._end(file, made, before, leaves))
        self.done.append(
            Stage(
                name=name,
                wall_s=record["wall_s"],
                resumed=resumed,
                peak_memory_bytes=record["peak_memory_bytes"],
            )
        )
        self.progress(name, 1.0, "found from an earlier run" if resumed else f"done in {record['wall_s']:.0f} s")
        return record["result"]

    def _begin(
        self, file: Path, key: str, leaves: Path | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:  # fmt: skip
        """The record that there is of this key, and the same again if nothing has to be done."""
        before = self._found(file, key)
        if before and (leaves is None or self._is_left(before, leaves)):
            return before, before
        file.unlink(missing_ok=True)  # a record of something else must not outlive its model
        return before, None

    def _end(
        self, file: Path, record: dict[str, Any], before: dict[str, Any] | None, leaves: Path | None
    ) -> dict[str, Any]:  # fmt: skip
        """Write the record of what was done."""
        if leaves is not None:
            record |= {"files": folder_files(leaves), "digest": model_digest(leaves)}
            if before and before["digest"] == record["digest"]:  # a lost model, made again: nothing else changed
                record = {**before, "files": record["files"]}
        write_json(file, record)
        return record

    def digest(self, name: str) -> str:
        """Of the model that a stage left."""
        found: str = agreed(lambda: self._read(self._file(name)))["digest"]
        return found

    def checkpoints(self, name: str, reads: object) -> Path:
        """Where a training of a stage keeps checkpoints: of other settings, in another place."""
        return self.out / "work" / "checkpoints" / f"{self._file(name).stem}-{key_of(reads)[:8]}"

    def _file(self, name: str) -> Path:
        return self.out / "work" / (name.replace(", ", "_").replace(" ", "-").replace("/", "_") + ".json")

    def _found(self, file: Path, key: str) -> dict[str, Any] | None:
        """The record of that stage and key."""
        record = self._read(file) if file.is_file() else {}
        return record if record.get("key") == key else None

    @staticmethod
    def _is_left(record: dict[str, Any], leaves: Path) -> bool:
        """Whether the folder is what the stage wrote: by sizes and times, else by content."""
        if not leaves.is_dir():
            return False
        try:
            return folder_files(leaves) == record.get("files") or model_digest(leaves) == record.get("digest")
        except FileNotFoundError:  # of its weights
            return False

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a stage's record ({error}); delete it to run that stage again") from None
        if not isinstance(found, dict) or not {"result", "wall_s", "peak_memory_bytes"} <= found.keys():
            raise ValueError(f"{file}: not a stage's record; delete it to run that stage again")
        return found

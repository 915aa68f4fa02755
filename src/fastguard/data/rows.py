"""Rows out of a file, a saved dataset or the Hub, each with the number by which its owner finds it.

`datasets` and `pyarrow` are imported where they are needed; JSON needs neither.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINES, LIST, PARQUET = (".jsonl", ".ndjson"), (".json",), (".parquet",)
TABLES = {".csv": ",", ".tsv": "\t"}
TEXT = (".txt",)
SUFFIXES = (*LINES, *LIST, *PARQUET, *TABLES, *TEXT)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of one set: iterate for (number, mapping), as often as wanted.

    source: path or id, with subset and split. fingerprint: ``sha256:`` of the file's bytes, or ``datasets:`` and that
    library's own, which changes with the content. by_line: numbers are a text file's lines, from 1; otherwise rows
    from 0, as ``dataset[17]`` counts them.
    """

    source: str
    fingerprint: str | None
    by_line: bool
    licence: str
    _open: Callable[[], Iterator[tuple[int, Row]]]

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return self._open()

    def place(self, number: int) -> str:
        """Where a row is, for an error."""
        return f"{self.source}:{number}" if self.by_line else f"{self.source}, row {number} (the first is 0)"


def read_rows(path: str, split: str | None = None, subset: str | None = None, revision: str | None = None) -> Rows:
    """The rows of a file, of a folder, or of a dataset on the Hub.

    A file is ``.jsonl``, ``.json`` (a list), ``.parquet``, ``.csv`` or ``.tsv``, whose first line names the columns, or
    ``.txt``, one ``prompt`` a line. A folder is one that ``datasets.save_to_disk`` wrote, or any that
    ``datasets.load_dataset`` reads. What is not on the disk is looked for on the Hub if it has the form of an id.

    Raises FileNotFoundError, ModuleNotFoundError (a library that this format needs), ValueError: a form that is not
    known, a split that does not exist or was not chosen; while rows are read, ``FILE:LINE:`` and what is wrong there.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _from_datasets(path, file, split, subset, revision)
    if file.is_file():
        if split is not None:
            raise ValueError(f"{path}: expected no split for a file, got {split!r}")
        suffix = file.suffix.lower()
        if suffix in LINES:
            return Rows(path, _sha256(file), True, "", lambda: _lines(path, file))
        if suffix in LIST:
            return Rows(path, _sha256(file), False, "", lambda: _list(path, file))
        if suffix in PARQUET:
            return Rows(path, _sha256(file), False, "", lambda: _parquet(path, file))
        if suffix in TABLES:
            return Rows(path, _sha256(file), True, "", lambda: _table(path, file, TABLES[suffix]))
        if suffix in TEXT:
            return Rows(path, _sha256(file), True, "", lambda: _text(path, file))
        raise ValueError(f"{path}: expected a file named {', '.join(SUFFIXES)}, got {file.suffix or 'no suffix'}")
    if file.suffix.lower() in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise FileNotFoundError(f"{path}: no such file or folder")
    return _from_datasets(path, None, split, subset, revision)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _lines(path: str, file: Path) -> Iterator[tuple[int, Row]]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
            yield number, _mapping(row, where)


def _text(path: str, file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(io.StringIO(_decoded(path, file), newline=None), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _table(path: str, file: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Rows of strings, each with the number of the line where it begins; an empty cell is an empty string."""
    reader = csv.reader(io.StringIO(_decoded(path, file), newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    before = 0
    while True:
        number = before + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: not valid CSV: {error}") from None
        before = reader.line_num
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if names is None:
            names = cells
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{path}:{number}: expected a name for each column, got {twice[0]!r} twice")
        elif len(cells) != len(names):
            raise ValueError(f"{path}:{number}: expected {len(names)} columns as in the first line, got {len(cells)}")
        else:
            yield number, dict(zip(names, cells, strict=True))


def _decoded(path: str, file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _list(path: str, file: Path) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(_decoded(path, file))
    except json.JSONDecodeError as error:
        more = "; one object a line is read from a file named .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{more}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield number, _mapping(row, f"{path}, row {number} (the first is 0)")


def _mapping(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
    return row


def _parquet(path: str, file: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file that pyarrow reads: {str(error).splitlines()[0]}") from error


def _from_datasets(path: str, folder: Path | None, split: str | None, subset: str | None, revision: str | None) -> Rows:
    try:
        import datasets
    except ModuleNotFoundError as error:
        what = "no such file or folder; a dataset of the Hub" if folder is None else "a folder"
        raise ModuleNotFoundError(f"{path}: {what} needs the package datasets: pip install datasets") from error
    saved = folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        else:
            at = path if folder is None else str(folder)
            found = datasets.load_dataset(at, subset, split=split, revision=revision)
    except Exception as error:  # the network's, the Hub's and every file format's own
        what = "not a file or folder, and the Hub gave no dataset" if folder is None else "no dataset could be read"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{path}: {what}: {type(error).__name__}: {reason}") from error
    source = path if subset is None else f"{path}, {subset}"
    if isinstance(found, datasets.DatasetDict):
        names = ", ".join(found)
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split is None:
            raise ValueError(f"{source}: expected a split, one of {names}; none was chosen")
        if split not in found:
            raise ValueError(f"{source}: expected a split of {names}, got {split!r}")
        found = found[split]
        source = f"{source}, {split}"
    elif split is not None and saved:
        raise ValueError(f"{source}: expected no split for a folder that holds one dataset, got {split!r}")
    elif split is not None:
        source = f"{source}, {split}"
    licence = found.info.license or ""
    return Rows(source, f"datasets:{found._fingerprint}", False, licence, lambda: iter(enumerate(found)))

"""Block shapes of the matrix kernels: ``configurations.json``, by kernel, class of shapes and chip.

    {"gram": {"half": {"NVIDIA H100 80GB HBM3": {...}, "sm_90": {...}, "144 KiB": {...}, "0 KiB": {...}}}}

A launch takes the row of its GPU's name, else of its compute capability, else of the most shared memory that the GPU
has. Nothing is searched at run time: rows by name are what ``fastguard bench --gpu --tune`` found fastest on that GPU
(docs/gpu.md), the others what compiles for such GPUs and was reasoned out. A tuned row is of a class that names its
width, and holds for no other: a call whose class has no row takes those of the class without a width.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

INSTALLED = Path(__file__).with_name("configurations.json")
VARIABLE = "FASTGUARD_CONFIGURATIONS"
"""Names a file to be read in place of the installed one."""

TUNED = "tuned"
"""The key of the file that is no kernel: by GPU when, and with which versions, its rows were measured."""

Row = Mapping[str, int]
Table = Mapping[str, Mapping[str, Mapping[str, Row]]]
Blocks = TypeVar("Blocks", bound=tuple[int, ...])

ALLOWED = {"stages": range(1, 9), "warps": (1, 2, 4, 8, 16)}
SIDES = tuple(2**i for i in range(4, 11))
"""What a number of a row may be, by its name; of all others the sides of blocks."""


class Chip(NamedTuple):
    """A GPU's name, its compute capability ("sm_90", of AMD "gfx942"), and bytes of shared memory of one program."""

    name: str
    capability: str
    shared: int


class Forced:
    """A row that is taken in place of the table's, and whether any launch has asked for it."""

    def __init__(self, row: Row) -> None:
        self.row, self.used = row, False


_forced: dict[tuple[str, str], Forced] = {}


def file() -> Path:
    """The table's."""
    return Path(os.environ.get(VARIABLE) or INSTALLED)


@functools.cache
def read(file: Path) -> Table:
    """A table, every row of which is one. Raises ValueError, which names the file and the key of what is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected a table of configurations: {error}") from error

    def mapping(value: Any, *keys: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{': '.join((str(file), *keys))}: expected names and values, got {value!r}")
        return value

    table = {kernel: rows for kernel, rows in mapping(found).items() if kernel != TUNED}
    for kernel, classes in table.items():
        for shape, chips in mapping(classes, kernel).items():
            for key, row in mapping(chips, kernel, shape).items():
                if key.endswith("KiB") and not re.fullmatch(r"\d+ KiB", key):
                    raise ValueError(
                        f'{file}: {kernel}: {shape}: expected a chip, or a size as in "144 KiB", got {key!r}'
                    )
                for name, number in mapping(row, kernel, shape, key).items():
                    allowed = ALLOWED.get(name, SIDES)
                    if type(number) is not int or number not in allowed:
                        at = f"{file}: {kernel}: {shape}: {key}: {name}"
                        raise ValueError(f"{at}: expected {', '.join(map(str, allowed))}, got {number!r}")
    return table


def tuned(file: Path) -> dict[str, str]:
    """By GPU when, and with which versions, its rows were measured."""
    found: dict[str, str] = json.loads(file.read_text(encoding="utf-8")).get(TUNED, {})
    return found


def classes(dtype: torch.dtype, width: int, *options: str) -> tuple[str, str]:
    """The class of a call, and the one without its width: "half, bias, 4096 wide" is from 4096 to 8191 features."""
    plain = ", ".join(("float32" if dtype.itemsize == 4 else "half", *options))
    return f"{plain}, {1 << max(width.bit_length() - 1, 0)} wide", plain


@functools.cache
def _where(file: Path, kernel: str, shapes: tuple[str, ...], chip: Chip) -> tuple[str, str] | None:
    """Class and key of the row for a chip; None where none of them fits it."""
    found = read(file).get(kernel, {})
    for shape in shapes:
        for key in (chip.name, chip.capability):
            if key in found.get(shape, {}):
                return shape, key
    for shape in shapes:
        sizes = {key: 1024 * int(key.removesuffix(" KiB")) for key in found.get(shape, {}) if key.endswith(" KiB")}
        fitting = [key for key, size in sizes.items() if size <= chip.shared]
        if fitting:
            return shape, max(fitting, key=lambda key: sizes[key])
    return None


def row_of(kernel: str, shapes: tuple[str, ...], chip: Chip) -> Row | None:
    """The row for a call of these classes on a chip; None where none fits it."""
    where = _where(file(), kernel, shapes, chip)
    return None if where is None else read(file())[kernel][where[0]][where[1]]


def find(
    kernel: str, shapes: tuple[str, ...], chip: Chip, kind: type[Blocks], most: Mapping[str, int] | None = None
) -> Blocks:
    """The row of a kernel for a call of these classes on a chip, as ``kind``, a NamedTuple of its numbers.

    most: the largest number that the kernel takes of a name. Raises ValueError, which names the file and the key,
    where there is no row, where it has other numbers than ``kind``, or one that is too large.
    """
    own = next((_forced[kernel, shape] for shape in shapes if (kernel, shape) in _forced), None)
    if own is not None:
        own.used = True
        return kind(**own.row)
    return _find(file(), kernel, shapes, chip, kind, tuple((most or {}).items()))


@functools.cache
def _find(
    file: Path, kernel: str, shapes: tuple[str, ...], chip: Chip, kind: type[Blocks], most: tuple[tuple[str, int], ...]
) -> Blocks:
    where = _where(file, kernel, shapes, chip)
    if where is None:
        raise ValueError(f"{file}: {kernel}: {shapes[-1]}: expected a row for {chip.name or 'a CPU'}, found none")
    row = read(file)[kernel][where[0]][where[1]]
    at = f"{file}: {kernel}: {where[0]}: {where[1]}"
    fields = kind._fields  # type: ignore[attr-defined]
    if set(row) != set(fields):
        raise ValueError(f"{at}: expected {', '.join(fields)}, got {', '.join(row) or 'nothing'}")
    for name, largest in most:
        if row[name] > largest:
            raise ValueError(f"{at}: {name}: expected at most {largest}, got {row[name]}")
    return kind(**row)


@contextlib.contextmanager
def forced(kernel: str, shape: str, row: Row) -> Iterator[Forced]:
    """Launches of a kernel by calls of a class take ``row`` here: how candidates are tried."""
    _forced[kernel, shape] = Forced(row)
    try:
        yield _forced[kernel, shape]
    finally:
        del _forced[kernel, shape]


def text(table: Table, tuned: Mapping[str, str]) -> bytes:
    """A table's file: a line a row, so that a change of one is a change of a line."""

    def indented(value: Any, depth: int) -> str:
        if depth == 3 or not value or not isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)
        items = (f"{json.dumps(key, ensure_ascii=False)}: {indented(value[key], depth + 1)}" for key in value)
        return "{" + ",".join(f"\n{' ' * (depth + 1)}{item}" for item in items) + f"\n{' ' * depth}}}"

    return (indented({TUNED: tuned, **table}, 0) + "\n").encode()

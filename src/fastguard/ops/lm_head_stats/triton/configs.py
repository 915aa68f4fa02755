"""The shapes of the matrix kernels' programs, as ``ops/table.py`` finds them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastguard.ops import table
from fastguard.ops.lm_head_stats.op import TILE
from fastguard.ops.table import Chip


class Blocks(NamedTuple):
    """Shape of a matrix kernel's program: outer and inner block, warps, pipeline stages."""

    outer: int
    inner: int
    warps: int
    stages: int


class Config(NamedTuple):
    """Block shapes of the four matrix kernels; TILE rows are the other side of each."""

    scan: Blocks  # columns (twice: see product2), D
    dlogit: Blocks  # columns, D
    dx: Blocks  # D, columns
    dweight: Blocks  # D, rows; also COLUMNS columns


COLUMNS = 128
"""Columns that one program of ``dweight_kernel`` owns, and the granularity of lists of live columns."""


def config(dtype: torch.dtype, width: int, chip: Chip) -> Config:
    """Block shapes for hidden states of a dtype and of ``width`` features, of which the table has rows for a chip."""
    shapes = table.classes(dtype, width)
    # A list's columns come in multiples of COLUMNS and rows in TILEs, which no block of them may straddle.
    whole = {"scan": None, "dlogit": {"outer": COLUMNS}, "dx": {"inner": COLUMNS}, "dweight": {"inner": TILE}}
    found = (table.find(f"lm_head_stats.{kernel}", shapes, chip, Blocks, most) for kernel, most in whole.items())
    return Config(*found)


BY_DESCRIPTORS = "lm_head_stats.scan_descriptors"


def by_descriptors(dtype: torch.dtype, width: int, options: bool) -> tuple[str, str]:
    """The class of a scan by descriptors; options: of a bias, a soft-cap or a mean logit."""
    return table.classes(dtype, width, *(["options"] if options else []))

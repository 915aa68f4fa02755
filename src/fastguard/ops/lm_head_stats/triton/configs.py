"""The shapes of the matrix kernels' programs."""

from __future__ import annotations

from typing import NamedTuple

import torch


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


def config(dtype: torch.dtype, shared: int) -> Config:
    """Block shapes for a dtype and a device with ``shared`` bytes of shared memory per program."""
    if dtype == torch.float32:
        small = Blocks(64, 32, 8, 2)
        return Config(small, small, small, small)
    square = Blocks(128, 64, 8, 4)
    # Lists of columns are read through an index, which takes the pipeline two more stages to run as deep.
    if shared >= 200 * 1024:  # Hopper, Blackwell
        return Config(scan=square, dlogit=square, dx=Blocks(256, 64, 8, 5), dweight=Blocks(256, 64, 8, 5))
    if shared >= 144 * 1024:  # A100
        listed = Blocks(128, 64, 8, 6)
        return Config(scan=Blocks(64, 64, 8, 4), dlogit=square, dx=listed, dweight=listed)
    narrow = Blocks(128, 32, 8, 2)
    return Config(scan=Blocks(64, 32, 8, 2), dlogit=narrow, dx=narrow, dweight=narrow)


PLAIN = Blocks(256, 64, 8, 4)
OPTIONS = Blocks(128, 64, 8, 4)
"""Columns and features of a step, warps, pipeline stages: of a head that has neither bias nor soft-cap, and others."""

"""How large the work is: an 8B model's shapes, or a rehearsal's on a machine without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shapes(NamedTuple):
    """All sizes of a run.

    device, dtype: of what is timed. checked: dtypes of the float64 check.
    rows, hidden, vocabulary, published: N, D, V of the head, and the V of other libraries' published figures.
    states: hidden states of the lens. check_rows, check_vocabulary: of the check, at the same D, so that its float64
    logits fit beside those of other processes.
    heads, kv_heads, mlp: of a decoder layer. depths: layers of the two models whose steps are timed; their difference
    is what a layer costs. samples, tokens: of a batch. square: side of the matrix product that is the roof.
    copied: bytes of the copy that is the other. warm, timed: seconds of each contender before it is timed, and of the
    slowest while it is. rounds: the fewest and the most. backend: what serves what is timed.
    jobs: processes that check at a time, whose compilers fill the cores.
    """

    device: str
    dtype: torch.dtype
    checked: tuple[torch.dtype, ...]
    rows: int
    hidden: int
    vocabulary: int
    published: int
    states: int
    check_rows: int
    check_vocabulary: int
    heads: int
    kv_heads: int
    mlp: int
    depths: tuple[int, int]
    samples: int
    tokens: int
    square: int
    copied: int
    warm: float
    timed: float
    rounds: tuple[int, int]
    backend: str
    jobs: int


BF16, FP32 = torch.bfloat16, torch.float32

LLAMA_8B = Shapes(
    device="cuda", dtype=BF16, checked=(BF16, FP32), rows=8192, hidden=4096, vocabulary=128256, published=131072,
    states=33, check_rows=512, check_vocabulary=32064, heads=32, kv_heads=8, mlp=14336, depths=(1, 2), samples=8,
    tokens=512, square=8192, copied=2**31, warm=0.5, timed=1.0, rounds=(3, 20), backend="triton", jobs=6,
)  # fmt: skip
"""Of Llama 3 8B."""

REHEARSAL = Shapes(
    device="cpu", dtype=FP32, checked=(FP32,), rows=6, hidden=16, vocabulary=40, published=48,
    states=2, check_rows=6, check_vocabulary=40, heads=2, kv_heads=1, mlp=24, depths=(1, 2), samples=2,
    tokens=8, square=16, copied=2**10, warm=0.0, timed=0.0, rounds=(2, 2), backend="portable", jobs=1,
)  # fmt: skip
"""Of no use but to run every line; fp32, since Triton's interpreter multiplies bf16 wrongly.

The interpreter serves the check; what is timed runs on the portable backend.
"""

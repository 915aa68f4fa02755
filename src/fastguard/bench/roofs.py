"""What the device can do at most, measured: a bf16 matrix product and a copy. All else is a fraction of these."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastguard.bench.shapes import Shapes
from fastguard.bench.work import Group, Work

GEMM, COPY = "matrix product", "copy"


def prepare(shapes: Shapes) -> Callable[[str], Work]:
    """Square factors; a copy's bytes are those read and those written."""

    def make(name: str) -> Work:
        if name == COPY:
            source = torch.ones(shapes.copied // 4, device=shapes.device)
            target = torch.empty_like(source)
            return Work(lambda: target.copy_(source), bytes=2 * shapes.copied)
        a, b = (torch.randn(shapes.square, shapes.square, device=shapes.device).to(shapes.dtype) for _ in range(2))
        return Work(lambda: torch.mm(a, b), flops=2.0 * shapes.square**3)

    return make


GROUP = Group((GEMM, COPY), prepare)

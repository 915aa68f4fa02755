"""``column_norms_`` in plain PyTorch, by tiles of rows in float64.

Shapes: N rows of B samples, I features.
"""

from __future__ import annotations

from torch import Tensor

TILE_ELEMENTS = {"cpu": 2**17, "other": 2**22}
"""Most elements of a tile: what stays in a CPU's cache, what fills a GPU."""


def squares(x: Tensor, bounds: Tensor, out: Tensor) -> None:
    """Add the sums of squares of the rows of x [N, I] within bounds [B, 2] to ``out``, float64.

    out: [B, I], a row a sample, or [1, I], all of them together.
    """
    step = max(1, TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["other"]) // x.shape[1])
    for b, (begin, end) in enumerate(bounds.tolist()):
        for start in range(begin, end, step):
            out[b % out.shape[0]] += x[start : min(start + step, end)].double().square().sum(0)

"""A model of which no parameter asks for a gradient for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from fastguard.nested.guard import Restoring
from fastguard.taps.structure import reshard


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: no product is computed for one, and no activation kept for it.

    FSDP2 fixes at its first forward what asks for one, and is left as it is; its shards are put back on leaving.
    """
    asking = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "placements")]

    def restore(finished: bool) -> None:
        for p in asking:
            p.requires_grad = True
        reshard(model)

    with Restoring() as guard:
        guard.on_exit(restore)
        for p in asking:
            p.requires_grad = False
        guard.release()
        yield

"""The C++ extension: loaded once, on first use, and optional."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def load() -> str | None:
    """Load the C++ kernels into ``torch.ops.fastguard_c``; None on success, else the reason they are absent."""
    try:
        importlib.import_module("fastguard._C")
    except ImportError as error:
        return f"the C++ extension is not built or does not load ({error})"
    return None

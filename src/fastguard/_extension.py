"""The C++ extension: loaded once, on first use, and optional."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from pathlib import Path

NOTE = Path(__file__).with_name("_extension.txt")
"""Where setup.py leaves the reason if it could not build the extension."""


@functools.cache
def load() -> str | None:
    """Load the C++ kernels into ``torch.ops.fastguard_c``; None on success, else the reason they are absent."""
    try:
        importlib.import_module("fastguard._C")
    except ImportError as error:
        reason = _absent(error)
        logging.getLogger(__name__).warning("CPU ops run on the slower portable backend: %s", reason)
        return reason
    return None


def _absent(error: ImportError) -> str:
    if importlib.util.find_spec("fastguard._C") is not None:
        return f"the C++ extension does not load ({error})"
    noted = " ".join(NOTE.read_text(encoding="utf-8").split()) if NOTE.is_file() else str(error)
    return f"the C++ extension is not built: {noted}"

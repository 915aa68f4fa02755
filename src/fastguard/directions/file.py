"""A safetensors file of directions: opened in one place, for whoever reads means or a basis out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastguard.machine import write_atomically

BASIS = "basis"
"""The tensor [K, D] that edits and contexts read; orthonormal rows."""


def read_tensors(file: str | Path, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of these names, or all, and what the file says of itself.

    Raises FileNotFoundError where there is no such file, ValueError where it is another kind of file or lacks a name.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"directions: there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as opened:
            held = sorted(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names or held if name in held}
            about = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"directions: {str(path)!r} is no safetensors file: {error}") from error
    for name in names:
        if name not in tensors:
            raise ValueError(f"directions: {str(path)!r} holds {', '.join(held) or 'nothing'}, expected {name!r}")
    return tensors, about


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write them, whole or not at all."""
    from safetensors.torch import save

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(Path(file), save(plain, dict(about)))

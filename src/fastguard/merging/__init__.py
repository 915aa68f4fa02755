"""Merges of models on disk that give a fine-tuned model its safety back, and those that mergekit's users know."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {"merge": "apply", "Merged": "apply", "Model": "inputs", "METHODS": "methods", "from_recipe": "recipe",
          "SubspaceMask": "subspace_mask"}  # fmt: skip

if TYPE_CHECKING:
    from fastguard.merging.apply import Merged as Merged
    from fastguard.merging.apply import merge as merge
    from fastguard.merging.inputs import Model as Model
    from fastguard.merging.methods import METHODS as METHODS
    from fastguard.merging.recipe import from_recipe as from_recipe
    from fastguard.merging.subspace_mask import SubspaceMask as SubspaceMask

__all__ = ["METHODS", "Merged", "Model", "SubspaceMask", "from_recipe", "merge"]


def _load(name: str) -> Any:
    """On first use: the command line lists the methods without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastguard.merging' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastguard.merging.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # to a type checker, any name would be there
    __getattr__ = _load

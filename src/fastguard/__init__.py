"""fastguard: fused kernels and drop-in modules that immunize open-weight models against harmful fine-tuning."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "RepNoiseLoss": "fastguard.losses.repnoise",
    "LanguageModelLoss": "fastguard.losses.language_model",
    "TAR": "fastguard.defenses.tar.step",
    "RandomMapping": "fastguard.defenses.random_mapping.step",
    "Booster": "fastguard.defenses.booster.step",
    "Vaccine": "fastguard.defenses.vaccine.step",
    "TVaccine": "fastguard.defenses.t_vaccine.step",
    "SEAM": "fastguard.defenses.seam.step",
    "CRL": "fastguard.defenses.crl.step",
    "SimulatedAttack": "fastguard.nested",
    "PairedCollator": "fastguard.data.collate",
    "TamperCollator": "fastguard.data.collate",
    "ChatCollator": "fastguard.data.collate",
    "lm_head_stats": "fastguard.ops.lm_head_stats",
    "lens_stats": "fastguard.ops.lens_stats",
    "linear_cross_entropy": "fastguard.ops.linear_cross_entropy",
    "head_kl": "fastguard.ops.head_kl",
    "gaussian_mmd": "fastguard.ops.gaussian_mmd",
    "representation_distance": "fastguard.ops.representation_distance",
}

_ROOMS = ("nested", "trainers")

__all__ = ["__version__", *_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that ``import fastguard`` stays light."""
    if name in _ROOMS:
        return importlib.import_module(f"fastguard.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastguard' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""fastguard: fused kernels and drop-in modules that immunize open-weight models against harmful fine-tuning."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "RepNoiseLoss": "fastguard.losses.repnoise",
    "LanguageModelLoss": "fastguard.losses.language_model",
    "ReFATLoss": "fastguard.losses.refat",
    "CircuitBreakerLoss": "fastguard.losses.circuit_breaker",
    "TAR": "fastguard.defenses.tar.step",
    "RandomMapping": "fastguard.defenses.random_mapping.step",
    "Booster": "fastguard.defenses.booster.step",
    "Vaccine": "fastguard.defenses.vaccine.step",
    "TVaccine": "fastguard.defenses.t_vaccine.step",
    "SEAM": "fastguard.defenses.seam.step",
    "CRL": "fastguard.defenses.crl.step",
    "SNTune": "fastguard.defenses.sn_tune.step",
    "RSNTune": "fastguard.defenses.rsn_tune.step",
    "SafetyFreezing": "fastguard.defenses.safety_freezing.step",
    "Antidote": "fastguard.defenses.antidote.step",
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
    "project_out": "fastguard.ops.project_out",
    "project_out_": "fastguard.ops.project_out",
    "add_project_rms_norm": "fastguard.ops.add_project_rms_norm",
    "class_moments_": "fastguard.ops.class_moments",
    "abs_weight_grad_": "fastguard.ops.abs_weight_grad",
    "column_norms_": "fastguard.ops.column_norms",
    "gram_": "fastguard.ops.gram",
    "threshold_select": "fastguard.ops.threshold_select",
    "apply_mask_": "fastguard.ops.masks",
    "pack_mask": "fastguard.ops.masks",
    "unpack_mask": "fastguard.ops.masks",
}

_ROOMS = ("directions", "merging", "nested", "saliency", "trainers")

if TYPE_CHECKING:  # the same names for type checkers and editors, which do not run __getattr__
    from fastguard import directions as directions
    from fastguard import merging as merging
    from fastguard import nested as nested
    from fastguard import saliency as saliency
    from fastguard import trainers as trainers
    from fastguard.data.collate import ChatCollator as ChatCollator
    from fastguard.data.collate import PairedCollator as PairedCollator
    from fastguard.data.collate import TamperCollator as TamperCollator
    from fastguard.defenses.antidote.step import Antidote as Antidote
    from fastguard.defenses.booster.step import Booster as Booster
    from fastguard.defenses.crl.step import CRL as CRL
    from fastguard.defenses.random_mapping.step import RandomMapping as RandomMapping
    from fastguard.defenses.rsn_tune.step import RSNTune as RSNTune
    from fastguard.defenses.safety_freezing.step import SafetyFreezing as SafetyFreezing
    from fastguard.defenses.seam.step import SEAM as SEAM
    from fastguard.defenses.sn_tune.step import SNTune as SNTune
    from fastguard.defenses.t_vaccine.step import TVaccine as TVaccine
    from fastguard.defenses.tar.step import TAR as TAR
    from fastguard.defenses.vaccine.step import Vaccine as Vaccine
    from fastguard.losses.circuit_breaker import CircuitBreakerLoss as CircuitBreakerLoss
    from fastguard.losses.language_model import LanguageModelLoss as LanguageModelLoss
    from fastguard.losses.refat import ReFATLoss as ReFATLoss
    from fastguard.losses.repnoise import RepNoiseLoss as RepNoiseLoss
    from fastguard.nested import SimulatedAttack as SimulatedAttack
    from fastguard.ops.abs_weight_grad import abs_weight_grad_ as abs_weight_grad_
    from fastguard.ops.add_project_rms_norm import add_project_rms_norm as add_project_rms_norm
    from fastguard.ops.class_moments import class_moments_ as class_moments_
    from fastguard.ops.column_norms import column_norms_ as column_norms_
    from fastguard.ops.gaussian_mmd import gaussian_mmd as gaussian_mmd
    from fastguard.ops.gram import gram_ as gram_
    from fastguard.ops.head_kl import head_kl as head_kl
    from fastguard.ops.lens_stats import lens_stats as lens_stats
    from fastguard.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from fastguard.ops.lm_head_stats import lm_head_stats as lm_head_stats
    from fastguard.ops.masks import apply_mask_ as apply_mask_
    from fastguard.ops.masks import pack_mask as pack_mask
    from fastguard.ops.masks import unpack_mask as unpack_mask
    from fastguard.ops.project_out import project_out as project_out
    from fastguard.ops.project_out import project_out_ as project_out_
    from fastguard.ops.representation_distance import representation_distance as representation_distance
    from fastguard.ops.threshold_select import threshold_select as threshold_select


__all__ = ["__version__", *_HOMES, *_ROOMS]


logging.getLogger(__name__).addHandler(logging.NullHandler())  # what to show is the application's choice


def _load(name: str) -> Any:
    """Public names are imported on first use, so that ``import fastguard`` stays light."""
    if name in _ROOMS:
        return importlib.import_module(f"fastguard.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastguard' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # to a type checker, any name would be there
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted(__all__)

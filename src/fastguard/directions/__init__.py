"""Directions in a model's residual stream: estimated, chosen among, kept in a file, taken out of forwards.

``estimate``  means of harmful and harmless instructions at every layer and position, in one pass
``found``     `Directions`, what that gives, and its file
``select``    which of them mediates refusal
``several``   principal directions, and those found again after ablation
``cone``      a direction, or the basis of a cone, refined by gradient
``stream``    `ablate`, `add`, `rotate`: a model's stream changed for the duration of a context
``probe``     how well a direction tells the classes apart, by layer
``basis``     from directions to an orthonormal basis
"""

from fastguard.directions.basis import orthonormalise
from fastguard.directions.cone import Cone, refine
from fastguard.directions.estimate import estimate
from fastguard.directions.found import Directions
from fastguard.directions.probe import Probe, auc, probe, separation
from fastguard.directions.select import Selection, divergences, refusal_scores, select, select_anyway
from fastguard.directions.several import iterate, principal, samples
from fastguard.directions.stream import Stream, ablate, add, rotate

__all__ = [
    "Cone",
    "Directions",
    "Probe",
    "Selection",
    "Stream",
    "ablate",
    "add",
    "auc",
    "divergences",
    "estimate",
    "iterate",
    "orthonormalise",
    "principal",
    "probe",
    "refine",
    "refusal_scores",
    "rotate",
    "samples",
    "select",
    "select_anyway",
    "separation",
]

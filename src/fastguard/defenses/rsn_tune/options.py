"""Options of RSN-Tune: those of SN-Tune, and how many neurons general text keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.defenses.sn_tune.options import Options as Safety
from fastguard.settings import number


@dataclass(frozen=True)
class Options(Safety):
    """See ``fastguard.defenses.rsn_tune.step.RSNTune``."""

    quick: ClassVar[Mapping[str, Any]] = {**Safety.quick, "foundation_most": 6}

    foundation_most: int | None = number(None, at_least=1)  # foundation neurons of a matrix; None: no limit

"""setuptools' build backend, which asks for torch only where there is something to compile against it.

A build in isolation sees nothing of the environment that it installs into. Without torch it could only leave the C++
kernels out, so it gets one of its own: the kernels keep to torch's stable ABI, and what is built against any torch from
2.11 on runs on every other. No torch is fetched for an sdist, without a compiler, or under FASTGUARD_NO_EXTENSION=1.
"""

from __future__ import annotations

import os
import shlex
import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

AGAINST = ["torch>=2.11", "ninja"]


def unbuildable() -> str | None:
    """Why the C++ kernels are not even tried; None if they are."""
    if os.environ.get("FASTGUARD_NO_EXTENSION") == "1":
        return "FASTGUARD_NO_EXTENSION=1 when it was built"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({compiler[0]}) where it was built"
    return None


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a wheel's build environment holds beside setuptools."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *([] if unbuildable() else AGAINST)]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for an editable install."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *([] if unbuildable() else AGAINST)]

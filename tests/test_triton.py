"""Triton kernels: in the interpreter, and compiled ahead of time; each in processes of their own.

TRITON_INTERPRET acts when a kernel is decorated, so that one process can do one of the two. The files in
tests/triton are named interp_*.py and aot_*.py: pytest does not collect them by itself.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "triton"
ENVIRONMENT = {"interp": {"TRITON_INTERPRET": "1", "FASTGUARD_BACKEND": "triton"}, "aot": {}}


@pytest.mark.skipif(importlib.util.find_spec("triton.language") is None, reason="triton is not installed")
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("half", [0, 1])  # they take minutes: two processes can share them
@pytest.mark.parametrize("kind", ENVIRONMENT)
def test_triton(kind, half):
    """Every test of every other file tests/triton/<kind>_*.py passes."""
    files = sorted(map(str, HERE.glob(f"{kind}_*.py")))[half::2]
    assert files, f"no tests in {HERE}/{kind}_*.py"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTGUARD_BACKEND")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))  # import aot
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", *files]
    child = subprocess.run(command, env=environment | ENVIRONMENT[kind], capture_output=True, text=True)
    if child.returncode:
        pytest.fail(f"{' '.join(command)}\n{child.stdout}\n{child.stderr}", pytrace=False)

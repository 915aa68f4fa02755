"""Other libraries' linear cross-entropies: functions of (hidden [N, D], weight [V, D], target [N]) to the mean loss.

Names and signatures as of liger-kernel 0.8.5 and its main branch of September 2026 (its functions for Hopper: pull
requests 1356, and 1334 with 1370), cut-cross-entropy 25.1.1 and quack's ``linear_cross_entropy`` module.
None is needed: one that is not there is named in the table.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastguard.bench.work import Absent

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def attribute(module: str, name: str) -> Any:
    """``module.name``; raises `Absent` where there is none, with what is missing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Absent(f"{module}.{name}: {error}") from error


def eager() -> Loss:
    """The logits, then torch's cross-entropy in fp32, as transformers computes it."""
    return lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t)


def compiled() -> Loss:
    """``torch.compile`` of eager; on a CPU, where this is a rehearsal, without its code generator."""
    return torch.compile(eager(), backend="inductor" if torch.cuda.is_available() else "eager")


def torchs_own() -> Loss:
    """``torch.nn.functional.linear_cross_entropy``, from torch 2.12 on."""
    own: Loss = attribute("torch.nn.functional", "linear_cross_entropy")
    return own


def liger() -> Loss:
    """Liger's module, in Triton."""
    module = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda h, w, t: module(w, h, t)


def liger_sm90() -> Loss:
    """Liger's function for Hopper alone, in CuTe DSL."""
    home = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
    function = attribute(home, "LigerFusedLinearCrossEntropySM90Function")
    return lambda h, w, t: function.apply(h, w, t)


def liger_scaled_sm90() -> Loss:
    """Liger's other function for Hopper, which keeps no logits: a loss a row."""
    home = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    function = attribute(home, "LigerFusedScaledCrossEntropySM90Function")

    def loss(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        found = function.apply(h, w, t)
        return (found[0] if isinstance(found, tuple) else found).mean()

    return loss


def cut() -> Loss:
    """cut-cross-entropy's, in Triton, with its filter as it comes."""
    own: Loss = attribute("cut_cross_entropy", "linear_cross_entropy")
    return own


def quack() -> Loss:
    """quack's, which keeps a chunk's logits, in CuTe DSL."""
    own: Loss = attribute("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return own


PEERS: dict[str, Callable[[], Loss]] = {
    "eager": eager,
    "torch.compile": compiled,
    "liger SM90 function": liger_sm90,
    "liger SM90 scaled function": liger_scaled_sm90,
    "liger": liger,
    "cut-cross-entropy": cut,
    "quack": quack,
    "torch.nn.functional.linear_cross_entropy": torchs_own,
}


def install(wheels: Path) -> tuple[Path, dict[str, str]]:
    """Wheels, each by itself and without what it depends on, into a new folder; and what pip said of those it refused.

    Nothing is fetched. Raises FileNotFoundError for a folder that is not there.
    """
    if not wheels.is_dir():
        raise FileNotFoundError(f"peers: expected a folder of wheels, got {str(wheels)!r}, which is none")
    target, refused = Path(tempfile.mkdtemp(prefix="fastguard-peers-")), {}
    for wheel in sorted(wheels.glob("*.whl")):
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--target", str(target)]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options, str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            refused[wheel.name] = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return target, refused

"""The vocabulary lens at Llama-3-8B's shapes on a GPU: D 4096, V 128256, 8192 rows, bf16, 33 hidden states.

One hidden state is timed against the peers, forward + backward with the head's gradient; then all 33 on one token
chain. Floor of one state: (2 N D V + 6 N D C) flops at the GEMM rate measured in the same run, C live columns. There
is no 8B checkpoint here: hidden states are synthetic, each a head row plus noise scaled so that the entropy is near
1 nat, as measured for inner layers (docs/performance.md); the live fraction is reported, since the time depends on it.

``FASTGUARD_BENCH_SMALL=1`` runs small shapes on any device: a check of this file, not a measurement.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

import measure
from fastguard.ops.lens_stats import lens_stats
from fastguard.ops.lens_stats.reference import final_norm
from fastguard.ops.linear_cross_entropy import linear_cross_entropy
from fastguard.ops.vocabulary import Norm

SMALL = os.environ.get("FASTGUARD_BENCH_SMALL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, D, V, STATES = (64, 64, 1000, 3) if SMALL else (8192, 4096, 128256, 33)
DTYPE = torch.float32 if SMALL else torch.bfloat16
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not SMALL, reason="needs a GPU, or FASTGUARD_BENCH_SMALL=1")


@pytest.fixture(scope="module")
def work():
    """(hidden [ROWS, D], head [V, D], norm weight [D], target [ROWS])."""
    torch.manual_seed(0)
    head = torch.randn(V, D, device=DEVICE) * D**-0.5
    peak = torch.randint(0, V, (ROWS,), device=DEVICE)
    # Normed to length sqrt(D); a head row has length 1. A logit of ln V + 3 at the peak leaves about 5% elsewhere.
    lean = (torch.tensor(float(V)).log() + 3) / D**0.5
    hidden = lean * head[peak] * D**0.5 + (1 - lean**2).clamp_min(0).sqrt() * torch.randn(ROWS, D, device=DEVICE)
    target = torch.where(torch.rand(ROWS, device=DEVICE) < 0.3, peak, torch.randint(0, V, (ROWS,), device=DEVICE))
    return hidden.to(DTYPE), head.to(DTYPE), torch.ones(D, device=DEVICE, dtype=DTYPE), target


def contenders():
    found = {
        "eager": lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t),
        "fastguard exact": lambda h, w, t: linear_cross_entropy(h, w, t, filter_tol=0.0),
        "fastguard": linear_cross_entropy,
    }
    found["torch.compile"] = torch.compile(found["eager"])
    if hasattr(F, "linear_cross_entropy"):
        found["torch.nn.functional.linear_cross_entropy"] = F.linear_cross_entropy
    if importlib.util.find_spec("cut_cross_entropy") and DEVICE == "cuda":
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = cut
    if importlib.util.find_spec("liger_kernel") and DEVICE == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda h, w, t: liger(w, h, t)
    return found


CONTENDERS = contenders()


def timed(benchmark, run, flops):
    def synchronous():
        run()
        measure.synchronize(DEVICE)

    benchmark.pedantic(synchronous, rounds=7, warmup_rounds=2)
    rate = measure.gemm_rate(min(ROWS, 4096), D, V, DTYPE, DEVICE)
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(synchronous, DEVICE),
        gemm_rate=rate,
        fraction_of_gemm_rate=flops / benchmark.stats.stats.median / rate,
    )


@pytest.mark.parametrize("name", CONTENDERS)
def test_one_state(benchmark, work, name):
    hidden, head, norm, target = work
    h = final_norm(hidden, Norm("rms", norm, eps=1e-5)).clone().requires_grad_()
    w = head.clone().requires_grad_()

    def run():
        return torch.autograd.grad(CONTENDERS[name](h, w, target), (h, w))

    exact = torch.autograd.grad(CONTENDERS["fastguard exact"](h, w, target), (h, w))
    errors = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(run(), exact, strict=True)]
    benchmark.group = f"linear cross-entropy, {ROWS} x {D} x {V}, {str(DTYPE).removeprefix('torch.')}"
    timed(benchmark, run, 6 * ROWS * D * V)
    benchmark.extra_info["gradient_error"] = errors


@pytest.mark.parametrize("name", ["fastguard", "fastguard exact"])
def test_all_states(benchmark, work, name):
    hidden, head, norm, target = work
    rows = torch.arange(ROWS, device=DEVICE)
    leaf = hidden.clone().requires_grad_()
    start = torch.zeros((), device=DEVICE).expand(V, D).requires_grad_()

    def run():
        token, total = start, 0.0
        for _ in range(STATES):
            stats, token = lens_stats(
                leaf, rows, head, target, norm_weight=norm, norm_eps=1e-5, token=token,
                filter_tol=0.0 if name.endswith("exact") else None,
            )  # fmt: skip
            total = total + stats.cross_entropy().mean()
        return torch.autograd.grad(total, (leaf, start))

    benchmark.group = f"lens over {STATES} hidden states, {ROWS} x {D} x {V}, {str(DTYPE).removeprefix('torch.')}"
    timed(benchmark, run, STATES * 2 * ROWS * D * V)

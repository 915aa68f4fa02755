"""linear_cross_entropy against every other one that runs here, on the output activations of SmolLM2.

512 rows, V 49152, D 576, forward + backward with the head's gradient. Liger's kernel needs a GPU and is then added;
cut-cross-entropy runs in its portable form (``impl="torch_compile"``).
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

import measure
from fastguard.ops.linear_cross_entropy import linear_cross_entropy

ROWS = 512


def contenders():
    found = {
        "eager": lambda h, w, t: F.cross_entropy(h @ w.t(), t),
        "fastguard exact": lambda h, w, t: linear_cross_entropy(h, w, t, filter_tol=0.0),
        "fastguard": linear_cross_entropy,
    }
    found["torch.compile"] = torch.compile(found["eager"])
    if hasattr(F, "linear_cross_entropy"):
        found["torch.nn.functional.linear_cross_entropy"] = F.linear_cross_entropy
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy (torch_compile)"] = lambda h, w, t: cut(h, w, t, impl="torch_compile")
    if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda h, w, t: liger(w, h, t)
    return found


CONTENDERS = contenders()


@pytest.mark.parametrize("name", CONTENDERS)
def test_linear_cross_entropy(benchmark, activations, name):
    hidden, weight, _, target = activations
    h = hidden[-1].reshape(-1, hidden[-1].shape[-1])[:ROWS].clone().requires_grad_()
    w, t = weight.clone().requires_grad_(), target.reshape(-1)[:ROWS]

    def run():
        return torch.autograd.grad(CONTENDERS[name](h, w, t), (h, w))

    grads = run()
    exact = torch.autograd.grad(F.cross_entropy(h @ w.t(), t), (h, w))
    benchmark.group = f"linear cross-entropy forward+backward, {ROWS} x 576 x 49152 fp32"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    rate = measure.gemm_rate(128, 576, 49152, torch.float32)
    flops = 6 * ROWS * 576 * 49152  # products of the eager algorithm, which keeps its logits
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(run),
        gemm_rate=rate,
        fraction_of_gemm_rate=flops / benchmark.stats.stats.median / rate,
        gradient_error=[float((a - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True)],
    )

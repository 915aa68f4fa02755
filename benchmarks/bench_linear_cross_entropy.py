"""linear_cross_entropy against every other one that runs here, on the output activations of SmolLM2.

512 rows, V 49152, D 576, forward + backward with the head's gradient; in bf16 too where the CPU multiplies it fast.
Once plainly, once with smoothed labels and class weights. torch's own comes in two forms: the reference, which is
eager's arithmetic, and chunks of rows, which computes the gradient in the forward and knows no smoothing. Liger's
kernel needs a GPU and is then added; cut-cross-entropy runs in its portable form (``impl="torch_compile"``).
"""

import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F

import measure
from fastguard.ops.linear_cross_entropy import linear_cross_entropy

ROWS = 512
SMOOTHING = 0.1


def contenders():
    found = {
        "eager": lambda h, w, t: F.cross_entropy(h @ w.t(), t),
        "fastguard exact": lambda h, w, t: linear_cross_entropy(h, w, t, filter_tol=0.0),
        "fastguard": linear_cross_entropy,
    }
    found["torch.compile"] = torch.compile(found["eager"])
    if hasattr(F, "linear_cross_entropy"):
        found["torch.nn.functional.linear_cross_entropy"] = F.linear_cross_entropy
        chunks = torch.nn.LinearCrossEntropyOptions()
        found["torch.nn.functional.linear_cross_entropy, chunked"] = functools.partial(
            F.linear_cross_entropy, options=chunks
        )
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy (torch_compile)"] = lambda h, w, t: cut(h, w, t, impl="torch_compile")
    if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda h, w, t: liger(w, h, t)
    return found


def weighted_contenders():
    """Those that smooth labels and weigh classes: functions of (h, w, t, class weights)."""
    found = {
        "eager": lambda h, w, t, c: F.cross_entropy(h @ w.t(), t, weight=c.to(h.dtype), label_smoothing=SMOOTHING),
        "fastguard": lambda h, w, t, c: linear_cross_entropy(h, w, t, class_weight=c, label_smoothing=SMOOTHING),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch.nn.functional.linear_cross_entropy"] = lambda h, w, t, c: F.linear_cross_entropy(
            h, w, t, weight=c.to(h.dtype), label_smoothing=SMOOTHING
        )
    return found


CONTENDERS = contenders()
WEIGHTED = weighted_contenders()
DTYPES = [torch.float32] + [torch.bfloat16] * measure.fast_bf16()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_linear_cross_entropy(benchmark, activations, name, dtype):
    compare(benchmark, activations, dtype, CONTENDERS[name], CONTENDERS["eager"], "linear cross-entropy")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTED)
def test_smoothed_and_weighted(benchmark, activations, name, dtype):
    weights = 0.5 + torch.rand(activations[1].shape[0], generator=torch.Generator().manual_seed(3))
    ours, eager = (functools.partial(with_weights, WEIGHTED[n], weights) for n in (name, "eager"))
    compare(benchmark, activations, dtype, ours, eager, f"linear cross-entropy, smoothing {SMOOTHING}, class weights,")


def with_weights(fn, weights, h, w, t):
    return fn(h, w, t, weights.to(h.device))


def compare(benchmark, activations, dtype, loss, eager, what):
    hidden, weight, _, target = activations
    h = hidden[-1].reshape(-1, hidden[-1].shape[-1])[:ROWS].to(dtype, copy=True).requires_grad_()
    w, t = weight.to(dtype, copy=True).requires_grad_(), target.reshape(-1)[:ROWS]

    def run():
        return torch.autograd.grad(loss(h, w, t), (h, w))

    grads = run()
    wide = h.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    exact = torch.autograd.grad(eager(*wide, t), wide)
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"{what} forward+backward, {ROWS} x 576 x 49152 {'fp32' if dtype == torch.float32 else name}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    rate = measure.gemm_rate(128, 576, 49152, dtype)
    flops = 6 * ROWS * 576 * 49152  # products of the eager algorithm, which keeps its logits
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(run),
        gemm_rate=rate,
        fraction_of_gemm_rate=flops / benchmark.stats.stats.median / rate,
        gradient_error=[float((a.float() - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True)],
    )

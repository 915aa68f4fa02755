"""lm_head_stats and lens_stats on SmolLM2's own activations: forward + backward of one tap.

256 rows (half of 4 x 128 tokens), V 49152, D 576. Layer 12 is what most taps of the lens look like (a peaked
distribution), layer 30 is the model's output (the widest). Floor: 2 N D V flops of the forward plus 6 N D C of the
backward over C live columns; the exact contender's is 8 N D V.
"""

import pytest
import torch

import measure
from fastguard.ops.lens_stats import lens_stats, reference

N_ROWS = 256
CONTENDERS = ("eager", "torch.compile", "fastguard exact", "fastguard")


def workload(activations, layer):
    hidden, weight, norm, target = activations
    rows = torch.arange(4 * 128).view(4, 128)[:, 64:].reshape(-1)
    h = hidden[layer][:4].reshape(-1, hidden[layer].shape[-1])
    kind = "none" if layer == len(hidden) - 1 else "rms"  # the last hidden state is already normed
    return h, rows, weight, target[:4].reshape(-1)[rows], kind, norm


def contender(name, h, rows, weight, target, kind, norm):
    leaf, w = h.clone().requires_grad_(), weight.clone().requires_grad_()

    def eager(leaf, w):
        lse, _, t, _ = reference.lens_stats(leaf, rows, w, target, kind, norm_weight=norm, norm_eps=1e-5)
        return (lse - t).mean()

    def fused(leaf, w):
        tol = 0.0 if name.endswith("exact") else None
        stats, _ = lens_stats(leaf, rows, w, target, norm_kind=kind, norm_weight=norm, norm_eps=1e-5, filter_tol=tol)
        return stats.cross_entropy().mean()

    loss = {"eager": eager, "torch.compile": torch.compile(eager)}.get(name, fused)
    return lambda: torch.autograd.grad(loss(leaf, w), (leaf, w))


@pytest.mark.parametrize("layer", [12, 30])
@pytest.mark.parametrize("name", CONTENDERS)
def test_lens_stats(benchmark, activations, name, layer):
    work = workload(activations, layer)
    run = contender(name, *work)
    benchmark.group = f"lens_stats forward+backward, layer {layer}, 256 x 576 x 49152 fp32"
    grads = run()
    exact = contender("fastguard exact", *work)()
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    rate = measure.gemm_rate(128, 576, 49152, torch.float32)
    flops = 8 * N_ROWS * 576 * 49152  # of the exact gradient, whoever computes less is credited for it
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(run),
        gemm_rate=rate,
        fraction_of_gemm_rate=flops / benchmark.stats.stats.median / rate,
        gradient_error=[float((a - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True)],
    )

"""add_project_rms_norm against PyTorch eager and compiled, and against itself without a projection.

Forward as in generation and evaluation under ablation, and forward + backward as in a training step, on an activation
of SmolLM2 (8 x 128 tokens, fp32) and one of an 8B model's width in bf16. The floor in bytes: residual and update read,
stream and norm written, 4 N D elements (and as many in the backward); in flops: 4 N K D for the projection. "x plain"
is against the op without a basis, taken alternately with the contender in the same test.
"""

import functools
import statistics
import time

import pytest
import torch

import measure
from fastguard.directions import orthonormalise
from fastguard.ops.add_project_rms_norm import add_project_rms_norm, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "8 x 128 x 576 fp32": ((8, 128, 576), torch.float32),
    "1 x 1024 x 4096 bf16": ((1, 1024, 4096), torch.bfloat16),
}
CONTENDERS = ("eager", "torch.compile", "fastguard")
EPS = 1e-5


def eager(residual, update, basis, weight, eps):
    """As models write it: a sum, a projection in the stream's dtype, a norm in fp32."""
    h = residual + update
    if basis is not None:
        q = basis.to(h.dtype)
        h = h - (h @ q.mT) @ q
    x = h.float()
    return h, weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


@functools.cache
def compiled():
    return torch.compile(eager)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("k", [0, 1, 4, 16, 64])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_add_project_rms_norm(benchmark, activation, backward, k, name):
    torch.manual_seed(0)
    shape, dtype = ACTIVATIONS[activation]
    basis = orthonormalise(torch.randn(k, shape[-1], device=DEVICE)) if k else None
    given = [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(backward) for _ in range(2)]
    weight = torch.rand(shape[-1], device=DEVICE).to(dtype).requires_grad_(backward)
    upstream = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    op = {"eager": eager, "torch.compile": compiled(), "fastguard": add_project_rms_norm}[name]

    def run(op=op, basis=basis):
        out = op(*given, basis, weight, EPS)
        return torch.autograd.grad(out, [*given, weight], upstream) if backward else out

    def plain():
        return run(add_project_rms_norm, None)

    def timed():
        run()
        measure.synchronize(DEVICE)

    with torch.no_grad():
        exact = reference.add_project_rms_norm(
            *(t[:, :64].double() for t in given), None if basis is None else basis.double(), weight.double(), EPS
        )
        found = op(*given, basis, weight, EPS)
        errors = [float((f[:, :64] - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
    seconds = {"own": [], "plain": []}
    for _ in range(12):  # alternately: what slows the machine slows both
        for key, body in (("own", run), ("plain", plain)):
            start = time.perf_counter()
            body()
            measure.synchronize(DEVICE)
            seconds[key].append(time.perf_counter() - start)
    ratio = statistics.median(seconds["own"][2:]) / statistics.median(seconds["plain"][2:])
    benchmark.group = f"add_project_rms_norm {'forward+backward' if backward else 'forward'}, K = {k}, {activation}"
    benchmark.pedantic(timed, rounds=10, warmup_rounds=1)
    median = benchmark.stats.stats.median
    floor_bytes = (8 if backward else 4) * given[0].nbytes
    floor_flops = (8 if backward else 4) * given[0].numel() * k
    peak = measure.peak_bytes(run, DEVICE)
    benchmark.extra_info.update(
        peak_bytes=peak, floor_bytes=floor_bytes, floor_flops=floor_flops, bytes_per_second=floor_bytes / median,
        times_plain=ratio, value_error=errors,
    )  # fmt: skip
    print(
        f"\n{activation:21} K={k:2} {'fwd+bwd' if backward else 'fwd':7} {name:14} {1e3 * median:8.3f} ms  "
        f"{floor_bytes / median / 1e9:5.1f} GB/s  {ratio:5.2f} x plain  errors {errors[0]:.1e} {errors[1]:.1e}"
    )

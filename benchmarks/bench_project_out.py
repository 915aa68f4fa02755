"""project_out against PyTorch eager and compiled.

Forward + backward with a constant basis: an activation of SmolLM2 (8 x 128 tokens, fp32), and one of an 8B model's
width in bf16, for 1, 4, 16 and 64 directions. The floor in bytes: the activation read and written, forward and
backward, 4 N D elements; in flops: 8 N K D. The bytes are compared with the plainest pass of as many, a
multiplication by a number into a new tensor, measured in the same run.
"""

import functools
import time

import pytest
import torch

import measure
from fastguard.directions import orthonormalise
from fastguard.ops.project_out import project_out, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "8 x 128 x 576 fp32": ((8, 128, 576), torch.float32),
    "1 x 1024 x 4096 bf16": ((1, 1024, 4096), torch.bfloat16),
}
CONTENDERS = ("eager", "torch.compile", "fastguard")


def eager(x, basis):
    q = basis.to(x.dtype)
    return x - (x @ q.mT) @ q


@functools.cache
def compiled():
    return torch.compile(eager)


@functools.cache
def floor_seconds(nbytes):
    """Measured seconds of reading a tensor and writing another, twice."""
    a = torch.ones(nbytes // 4, device=DEVICE)
    return 2 * measure.median_seconds(lambda: a * 1.5, 9, DEVICE)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("k", [1, 4, 16, 64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_project_out(benchmark, activation, k, name):
    torch.manual_seed(0)
    shape, dtype = ACTIVATIONS[activation]
    basis = orthonormalise(torch.randn(k, shape[-1], device=DEVICE))
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    upstream = torch.randn(shape, device=DEVICE).to(dtype)
    forward = {"eager": eager, "torch.compile": compiled(), "fastguard": project_out}[name]

    def run():
        return torch.autograd.grad(forward(x, basis), x, upstream)[0]

    def timed():
        run()
        measure.synchronize(DEVICE)

    got = run()
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    want = reference.project_out(upstream[:, :64].double(), basis.double())
    error = float((got[:, :64] - want).norm() / want.norm())
    benchmark.group = f"project_out forward+backward, {k} directions, {activation}"
    # bf16 products of few columns take seconds on CPUs that emulate them
    benchmark.pedantic(timed, rounds=15 if took < 0.1 else 3, warmup_rounds=3 if took < 0.1 else 0)
    seconds = benchmark.stats.stats.median
    floor_bytes, floor_flops = 4 * x.nbytes, 8 * x.numel() * k
    fraction = floor_seconds(x.nbytes) / seconds
    peak = measure.peak_bytes(run, DEVICE)
    benchmark.extra_info.update(
        peak_bytes=peak, floor_bytes=floor_bytes, floor_flops=floor_flops, bytes_per_second=floor_bytes / seconds,
        flops_per_second=floor_flops / seconds, fraction_of_floor=fraction, gradient_error=[error],
    )  # fmt: skip
    print(
        f"\n{activation:21} K={k:2} {name:14} {1e3 * seconds:8.3f} ms  {floor_bytes / seconds / 1e9:5.1f} GB/s  "
        f"{floor_flops / seconds / 1e9:6.1f} Gflop/s  {fraction:4.0%} of the plainest passes  error {error:.1e}"
    )

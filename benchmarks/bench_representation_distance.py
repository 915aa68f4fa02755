"""representation_distance against PyTorch eager and compiled.

Forward + backward with a gradient of its own for each row, on one hidden state of SmolLM2 as a tap sees it (4 x 128
tokens, fp32), on all 31 of them, and on two of an 8B model's width at 2048 tokens in bf16. Nothing but memory traffic
cannot be avoided: both stacks read forward and backward, the gradient written. It is compared with the plainest
passes of the same bytes, measured in the same run: a sum of each stack, and their sum into a new tensor. (On a CPU
the pages of a large new tensor cost more than all traffic; ``fraction_of_floor`` counts them on both sides.)
"""

import functools

import pytest
import torch

import measure
from fastguard.ops.representation_distance import reference, representation_distance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STACKS = {
    "1 x 512 x 576 fp32": ((1, 512, 576), torch.float32),
    "31 x 512 x 576 fp32": ((31, 512, 576), torch.float32),
    "2 x 2048 x 4096 bf16": ((2, 2048, 4096), torch.bfloat16),
}


def eager_l2(a, b):
    return torch.linalg.vector_norm(a.float() - b.float(), dim=-1)


def eager_cosine(a, b):
    return 1 - torch.cosine_similarity(a.float(), b.float(), dim=-1)


EAGER = {"l2": eager_l2, "cosine": eager_cosine}
CONTENDERS = ("eager", "torch.compile", "fastguard")


@functools.cache
def compiled(kind):
    return torch.compile(EAGER[kind])


@functools.cache
def floor_seconds(nbytes):
    """Measured seconds of reading two stacks, and of reading them and writing a third, which is new."""
    a, b = (torch.ones(nbytes // 4, device=DEVICE) for _ in range(2))
    read = measure.median_seconds(lambda: (a.sum(), b.sum()), 9, DEVICE)
    return read + measure.median_seconds(lambda: a + b, 9, DEVICE)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.parametrize("stack", STACKS)
def test_representation_distance(benchmark, stack, kind, name):
    torch.manual_seed(0)
    shape, dtype = STACKS[stack]
    a = torch.randn(shape, device=DEVICE)
    b = (a + 0.1 * torch.randn(shape, device=DEVICE)).to(dtype)  # a model that has moved by a tenth
    a = a.to(dtype).requires_grad_()
    upstream = torch.linspace(0.5, 1.5, shape[0] * shape[1], device=DEVICE).view(shape[:2])
    run_forward = {
        "eager": EAGER[kind],
        "torch.compile": compiled(kind),
        "fastguard": lambda x, y: representation_distance(x, y, kind=kind),
    }[name]

    def run():
        return torch.autograd.grad(run_forward(a, b), a, upstream)[0]

    def timed():
        run()
        measure.synchronize(DEVICE)

    grad = run()
    exact = a.detach()[:1].double().requires_grad_()
    distance = reference.representation_distance(exact, b[:1].double(), kind=kind)
    want = torch.autograd.grad(distance, exact, upstream[:1].double())[0]
    error = float((grad[:1] - want).norm() / want.norm())
    del exact, distance, want, grad
    benchmark.group = f"representation_distance {kind} forward+backward, {stack}"
    benchmark.pedantic(timed, rounds=15, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    floor = 5 * a.nbytes
    fraction = floor_seconds(a.nbytes) / seconds
    peak = measure.peak_bytes(run, DEVICE)
    benchmark.extra_info.update(
        peak_bytes=peak, floor_bytes=floor, bytes_per_second=floor / seconds, fraction_of_floor=fraction,
        gradient_error=[error],
    )  # fmt: skip
    print(
        f"\n{kind:7} {stack:21} {name:14} {1e3 * seconds:8.3f} ms  {floor / seconds / 1e9:5.1f} GB/s  "
        f"{fraction:4.0%} of the plainest passes  peak {peak / 1e6:6.1f} MB  error {error:.1e}"
    )

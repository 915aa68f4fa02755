"""abs_weight_grad_ against what gives the same numbers, on the linears of SmolLM2: 8 samples of 128 or 512 tokens.

The floor is one weight-gradient product of the whole batch (``dW``), timed in turn with every contender, so that what
else the machine does weighs on both. ``ratio_to_plain`` is the median of the ratios of neighbouring times.
"""

import statistics
import time

import pytest
import torch

import measure
from fastguard.ops.abs_weight_grad import abs_weight_grad_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLES, ROUNDS = 8, 9
WEIGHTS = [(576, 576), (1536, 576), (576, 1536), (192, 576)]
CASES = [
    *((torch.float32, t, *weight) for t in (128, 512) for weight in WEIGHTS),
    *((torch.bfloat16, 512, *weight) for weight in WEIGHTS),
    (torch.float32, 16, 576, 576),
]


def product(grad_out, input):
    """What the backward pass computes for the weight: the floor."""
    return grad_out.flatten(0, 1).T @ input.flatten(0, 1)


def loop(score, grad_out, input):
    """Sample by sample, as with a batch size of 1."""
    for dy, x in zip(grad_out, input, strict=True):
        score += (dy.T @ x).abs()


def batched(score, grad_out, input):
    """All samples' gradients at once, in memory."""
    score += torch.bmm(grad_out.mT, input).abs().sum(0)


def vmapped(score, grad_out, input):
    """torch.func's way to per-sample gradients."""
    score += torch.func.vmap(lambda dy, x: dy.T @ x)(grad_out, input).abs().sum(0)


CONTENDERS = {
    "eager": loop,
    "bmm": batched,
    "vmap": vmapped,
    "torch.compile": torch.compile(batched),
    "fastguard": abs_weight_grad_,
    "fastguard, Fisher and dW too": abs_weight_grad_,
}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{str(c[0])[6:]}-{c[1]}-{c[2]}x{c[3]}")
def test_abs_weight_grad(benchmark, case, name):
    dtype, tokens, outputs, inputs = case
    torch.manual_seed(0)
    grad_out = torch.randn(SAMPLES, tokens, outputs, device=DEVICE).to(dtype)
    x = torch.randn(SAMPLES, tokens, inputs, device=DEVICE).to(dtype)
    score, squared, signed = torch.zeros(3, outputs, inputs, device=DEVICE)
    more = {"squared": squared, "signed": signed} if "Fisher" in name else {}

    def run():
        CONTENDERS[name](score, grad_out, x, **more)
        measure.synchronize(DEVICE)

    def floor():
        product(grad_out, x)
        measure.synchronize(DEVICE)

    run()
    want = sum((dy.T @ rows).abs() for dy, rows in zip(grad_out.double(), x.double(), strict=True))
    error = float((score - want).norm() / want.norm())
    floor()
    times = []

    def timed():
        start = time.perf_counter()
        floor()
        times.append([time.perf_counter() - start])

    def contender():
        start = time.perf_counter()
        run()
        times[-1].append(time.perf_counter() - start)

    benchmark.group = f"abs_weight_grad_, {str(dtype)[6:]}, {SAMPLES} x {tokens} tokens, {outputs} x {inputs}"
    benchmark.pedantic(contender, setup=timed, rounds=ROUNDS)
    ratio = statistics.median(ours / plain for plain, ours in times)
    seconds, plain = benchmark.stats.stats.median, statistics.median(plain for plain, _ in times)
    flops = 2 * SAMPLES * tokens * outputs * inputs
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(run, DEVICE), floor_flops=flops, floor_seconds=plain, ratio_to_plain=ratio,
        fraction_of_gemm_rate=1 / ratio, value_error=[error],
    )  # fmt: skip
    print(f"\n{benchmark.group:68} {name:28} {1e3 * seconds:8.2f} ms, dW {1e3 * plain:8.2f}, ratio {ratio:5.2f}, "
          f"error {error:.1e}, peak {benchmark.extra_info['peak_bytes'] / 1e6:.1f} MB")  # fmt: skip

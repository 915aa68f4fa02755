"""class_moments_ against what is published: clones of whole activations in float64, sums of a slice.

One layer's activations of SmolLM2 (64 prompts of 60 tokens, fp32) and of an 8B model (bf16), two classes, the last five
positions. The floor in bytes: those positions read, the state read and written; in flops: one addition an element read.
"""

import pytest
import torch

import measure
from fastguard.ops.class_moments import class_moments_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "64 x 60 x 576 fp32": ((64, 60, 576), torch.float32),
    "64 x 60 x 4096 bf16": ((64, 60, 4096), torch.bfloat16),
}
PLACES = range(-5, 0)


def published(total, x, label):
    """Arditi et al.'s hook, once a class: the activation is cloned to float64 before it is sliced."""
    for c in (0, 1):
        total[c] += x[label == c].clone().to(torch.float64)[:, list(PLACES)].sum(0)


def sliced(total, x, label):
    """The same sums of a slice."""
    for c in (0, 1):
        total[c] += x[:, -5:][label == c].double().sum(0)


@pytest.mark.parametrize("name", ["published", "sliced", "fastguard", "fastguard, second moments"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_class_moments(benchmark, activation, name):
    torch.manual_seed(0)
    shape, dtype = ACTIVATIONS[activation]
    x = torch.randn(shape, device=DEVICE).add(3).to(dtype)
    label = torch.arange(shape[0], device=DEVICE) % 2
    total = torch.zeros(2, 5, shape[-1], dtype=torch.float64, device=DEVICE)
    count = torch.zeros(2, dtype=torch.long, device=DEVICE)
    mean, rest, second, second_rest = (torch.zeros(2, 5, shape[-1], device=DEVICE) for _ in range(4))
    more = {"second": second, "second_rest": second_rest} if "second" in name else {}

    def run():
        if name.startswith("fastguard"):
            class_moments_(count, mean, rest, x, label, positions=PLACES, **more)
        else:
            {"published": published, "sliced": sliced}[name](total, x, label)

    def timed():
        run()
        measure.synchronize(DEVICE)

    run()
    found = mean.double() + rest.double() if name.startswith("fastguard") else total / (shape[0] / 2)
    want = torch.stack([x[label == c][:, -5:].double().mean(0) for c in (0, 1)])
    error = float((found - want).norm() / want.norm())
    benchmark.group = f"class_moments_, {activation}"
    benchmark.pedantic(timed, rounds=15, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    read = shape[0] * 5 * shape[-1]
    floor = read * x.element_size() + 2 * (2 + len(more)) * mean.nbytes
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(run, DEVICE), floor_bytes=floor, floor_flops=read,
        bytes_per_second=floor / seconds, value_error=[error],
    )  # fmt: skip
    print(f"\n{activation:20} {name:26} {1e3 * seconds:8.3f} ms  {floor / seconds / 1e9:5.1f} GB/s  error {error:.1e}")

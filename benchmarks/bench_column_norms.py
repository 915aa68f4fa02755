"""column_norms_ against the eager sum of squares, compiled and not, and the published hook.

The inputs of one linear over 64 samples of 128 tokens: SmolLM2 (fp32) and an 8B model (bf16). The floor: x read
once, two flops an element. The bandwidth is that of torch's own sum of x, which reads it and no more.
"""

import pytest
import torch

import measure
from fastguard.ops.column_norms import column_norms_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "64 x 128 x 576 fp32": ((64, 128, 576), torch.float32),
    "64 x 128 x 4096 bf16": ((64, 128, 4096), torch.bfloat16),
}


def eager(sums, x):
    sums += x.float().square().sum((0, 1))


def published(sums, x):
    """Wanda's hook (arXiv 2306.11695): the norm of a transposed fp32 copy, squared again."""
    rows = x.reshape(-1, x.shape[-1]).t().float()
    sums += torch.norm(rows, p=2, dim=1) ** 2


@pytest.mark.parametrize("name", ["eager", "compiled", "published", "fastguard", "fastguard, least and greatest"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_column_norms(benchmark, activation, name):
    torch.manual_seed(0)
    shape, dtype = ACTIVATIONS[activation]
    x = torch.randn(shape, device=DEVICE).add(1).to(dtype)
    ours = name.startswith("fastguard")
    sums = torch.zeros(shape[-1], dtype=torch.float64 if ours else torch.float32, device=DEVICE)
    least = torch.full_like(sums, torch.inf)
    more = {"least": least, "greatest": -least} if "least" in name else {}
    torch._dynamo.reset()
    theirs = {"eager": eager, "compiled": torch.compile(eager), "published": published}

    def run():
        if ours:
            column_norms_(sums, x, **more)
        else:
            theirs[name](sums, x)

    def timed():
        run()
        measure.synchronize(DEVICE)

    run()
    want = x.double().square().sum((0, 1))
    error = float((sums.double() / want - 1).abs().max())
    reading = measure.median_seconds(lambda: x.sum(), 9, DEVICE)
    benchmark.group = f"column_norms_, {activation}"
    benchmark.pedantic(timed, rounds=15, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(run, DEVICE), floor_bytes=x.nbytes, floor_flops=2 * x.numel(),
        bytes_per_second=x.nbytes / seconds, fraction_of_bandwidth=reading / seconds, value_error=[error],
    )  # fmt: skip
    print(
        f"\n{activation:21} {name:30} {1e3 * seconds:8.3f} ms  {x.nbytes / seconds / 1e9:5.1f} GB/s  "
        f"{reading / seconds:.0%} of a sum's rate  error {error:.1e}"
    )

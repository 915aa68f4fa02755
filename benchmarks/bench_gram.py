"""gram_ against the product that it is half of: x^T x added to the matrix, in the dtype of x and in fp32.

The inputs of one linear over 16 samples of 128 tokens: SmolLM2's q, k and v (576 features), its down projection (1536).
The floor in flops: N I (I + 1), half of a product's; in bytes: x and the matrix read, the matrix written.
"""

import pytest
import torch

import measure
from fastguard.ops.gram import gram_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "2048 x 576 fp32": ((16, 128, 576), torch.float32),
    "2048 x 576 bf16": ((16, 128, 576), torch.bfloat16),
    "2048 x 1536 fp32": ((16, 128, 1536), torch.float32),
}
THEIRS = {
    "x^T x, same dtype": lambda gram, rows: gram.add_(rows.mT @ rows),
    "x^T x, fp32": lambda gram, rows: gram.addmm_(rows.float().mT, rows.float()),
}


@pytest.mark.parametrize("name", [*THEIRS, "fastguard", "fastguard, three of four tokens"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gram(benchmark, activation, name):
    torch.manual_seed(0)
    shape, dtype = ACTIVATIONS[activation]
    x = torch.randn(shape, device=DEVICE).add(0.5).to(dtype)
    lengths = [shape[1] * 3 // 4] * shape[0] if "three" in name else None
    rows = x[:, : shape[1] * 3 // 4].flatten(0, 1) if lengths else x.flatten(0, 1)
    narrow = dtype if "same" in name else torch.float32
    gram = torch.zeros(shape[-1], shape[-1], dtype=narrow, device=DEVICE)

    def run():
        if name.startswith("fastguard"):
            gram_(gram, x, lengths=lengths)
        else:
            THEIRS[name](gram, rows)

    def timed():
        run()
        measure.synchronize(DEVICE)

    run()
    want = rows.double().mT @ rows.double()
    error = float((gram.double() - want).norm() / want.norm())
    rate = measure.gemm_rate(shape[-1], rows.shape[0], shape[-1], torch.float32, DEVICE)
    benchmark.group = f"gram_, {activation}"
    benchmark.pedantic(timed, rounds=9, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    floor = rows.shape[0] * shape[-1] * (shape[-1] + 1)
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(run, DEVICE), floor_flops=floor, floor_bytes=rows.nbytes + 2 * gram.nbytes,
        fraction_of_gemm_rate=floor / rate / seconds, value_error=[error],
    )  # fmt: skip
    share = floor / rate / seconds
    print(f"\n{activation:17} {name:32} {1e3 * seconds:8.2f} ms  {share:.0%} of the rate  error {error:.1e}")

"""threshold_select on 1e8 scores, and on 1e6, against torch.topk, torch.kthvalue and torch.sort.

All leave what tells the largest tenth: masks of one bit, indices (topk), or the threshold alone (kthvalue). Bytes are
those that cannot be avoided by digits of 16 bits: the scores read once a digit and once for the masks, which are
written. The bandwidth they are compared with is that of a sum over the same scores in the same run.
"""

import functools

import pytest
import torch

import measure
from fastguard.ops.masks import count_bits
from fastguard.ops.threshold_select import threshold_select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIGITS = {"fp32": 2, "bf16": 1}
SIZES = {"1e6": 10**6, "1e8": 10**8}
ROW = 1000
Q = 0.1


@functools.lru_cache(maxsize=1)
def scores(size, dtype):
    torch.manual_seed(0)
    return torch.randn(SIZES[size], device=DEVICE).abs_().to(DTYPES[dtype])


def read_rate(x):
    """Measured bytes/s of reading the scores."""
    return x.nbytes / measure.median_seconds(lambda: x.sum(), 5, DEVICE)


CONTENDERS = {
    "fastguard": lambda x: threshold_select(x, Q),
    "fastguard, rows": lambda x: threshold_select(x.view(-1, ROW), Q, per="row"),
    "torch.topk": lambda x: x.topk(int(Q * x.numel()), sorted=False),
    "torch.topk, rows": lambda x: x.view(-1, ROW).topk(int(Q * ROW), sorted=False),
    "torch.kthvalue": lambda x: x.kthvalue(x.numel() - int(Q * x.numel()) + 1),
    "torch.sort": lambda x: x.sort(descending=True),
}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_threshold_select(benchmark, size, dtype, name):
    x = scores(size, dtype)

    def run():
        result = CONTENDERS[name](x)
        measure.synchronize(DEVICE)
        return result

    benchmark.group = f"threshold_select, {size} scores {dtype}"
    found = run()
    benchmark.pedantic(run, rounds=3 if size == "1e8" else 7)
    benchmark.extra_info["peak_bytes"] = measure.peak_bytes(run, DEVICE)
    if name.startswith("fastguard"):
        assert int(count_bits(found.masks)) == found.count == int(Q * x.numel())
        passes = 2 if name.endswith("rows") else DIGITS[dtype] + 1
        floor = passes * x.nbytes + x.numel() // 8
        rate = floor / benchmark.stats.stats.median
        benchmark.extra_info.update(floor_bytes=floor, bytes_per_second=rate, fraction_of_bandwidth=rate / read_rate(x))

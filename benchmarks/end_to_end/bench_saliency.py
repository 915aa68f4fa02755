"""SNIP scores of every linear map of SmolLM2: a pass of scoring beside a plain backward pass, and beside its peers.

Every round times a plain forward and backward of a batch, with the gradients of the same weights, immediately before
fastguard's pass on it: the ratio is taken pair by pair, so that a drifting machine moves both. The peers see one batch,
and have to agree with fastguard on it. Peak memory comes from processes of their own.
"""

import gc
import importlib.util
import statistics
import time

import pytest
import torch

import measure
from end_to_end import saliency_work as work
from end_to_end.nested_step import row

ROUNDS = {torch.float32: 6, torch.bfloat16: 4}
PEERS = ("published", "torch.func", "opacus")


def timed(run, batch):
    gc.collect()
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", ["fastguard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saliency(benchmark, dtype, name):
    if dtype == torch.bfloat16 and not measure.fast_bf16():
        pytest.skip("this CPU multiplies bf16 matrices slower than fp32 ones")
    rounds = ROUNDS[dtype]
    model, batches = work.workload(dtype, rounds + 1)
    benchmark.group = (
        f"saliency: SNIP of the layers' linear maps, {rounds} x {work.SAMPLES} samples of {work.TOKENS} tokens, a "
        f"batch, SmolLM2-135M, {str(dtype).removeprefix('torch.')}"
    )
    rate = measure.gemm_rate(work.SAMPLES * work.TOKENS, 576, 1536, dtype)
    own, plain = work.contender(name, model)[0], work.contender("plain", work.workload(dtype, 1)[0])[0]
    warm = batches.pop()
    for run in (plain, own):
        run(warm)
    floors, at = [], iter(batches)

    def setup():
        batch = next(at)
        floors.append(timed(plain, batch))
        return (batch,), {}

    benchmark.pedantic(own, setup=setup, rounds=rounds)
    times = list(benchmark.stats.stats.data)
    ratios = [t / f for t, f in zip(times, floors, strict=True)]
    exact, beside = work.contender(name, model), []
    exact[0](warm)
    expected, errors, left_out = exact[1](), {}, {}
    for peer in PEERS:
        if importlib.util.find_spec(peer.partition(".")[0] if peer != "published" else "torch") is None:
            continue
        run, sums = work.contender(peer, work.workload(dtype, 1)[0])
        try:
            seconds = timed(run, warm)
        except (RuntimeError, ValueError) as error:  # it does not run on this model
            left_out[peer] = str(error).splitlines()[0][:120]
            continue
        errors[peer] = max(float((sums()[n] - e).norm() / e.norm()) for n, e in expected.items())
        assert errors[peer] < (1e-2 if dtype == torch.float32 else 0.1)  # of other batches or attention: other rounding
        beside.append(
            row(peer, [seconds], seconds / statistics.median(floors), work.peak_in_fresh_process(peer, dtype))
        )
        del run, sums
    flops = work.flops(model, warm)
    benchmark.extra_info.update(
        ratio_to_plain=statistics.median(ratios), peak_bytes=work.peak_in_fresh_process(name, dtype),
        flops_of_dw=flops, gemm_rate=rate, difference=errors,
        left_out="; ".join(f"{p} ({left_out.get(p, 'not installed')})" for p in PEERS if p not in errors) or "none",
        beside=[
            row("plain, with dW", floors, 1.0, work.peak_in_fresh_process("plain", dtype)), *beside,
        ],
    )  # fmt: skip

"""The RepNoise step on SmolLM2 with real text, against plain cross-entropy on the same two batches.

Every round times plain cross-entropy immediately before the contender: the ratio is taken pair by pair, so that a
drifting machine moves both. Peak memory comes from a process of its own. Flop floor of the ratio: 1.5 to 1.6
(docs/performance.md).
"""

import statistics
import time

import pytest
import torch

import measure
from end_to_end import step

SHAPES = {"4 x 128": (4, 128), "8 x 256": (8, 256)}
ROUNDS = {"4 x 128": 3, "8 x 256": 2}
DTYPES = [torch.float32] + ([torch.bfloat16] if measure.fast_bf16() else [])


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request):
    return (*step.load(request.param), request.param)


def gradients(model, run):
    run()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", step.CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_repnoise_step(benchmark, model, shape, name):
    model, tokenizer, dtype = model
    batch, tokens = SHAPES[shape]
    if name not in ("plain", "fastguard") and (shape != "4 x 128" or dtype != torch.float32):
        pytest.skip("contenders that take half a minute a step: one shape, fp32")
    if dtype == torch.bfloat16 and shape != "4 x 128":
        pytest.skip("bf16: one shape")
    harmful, harmless = step.pair(tokenizer, batch, tokens)
    plain = step.step("plain", model, harmful, harmless)
    run = step.step(name, model, harmful, harmless)
    plain()
    plain_times = []

    def before():
        start = time.perf_counter()
        plain()
        plain_times.append(time.perf_counter() - start)

    benchmark.group = f"RepNoise step, SmolLM2-135M, {shape} tokens, {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(run, setup=before, rounds=2 if name.startswith("published") else ROUNDS[shape], warmup_rounds=1)
    times = list(benchmark.stats.stats.data)
    benchmark.extra_info.update(
        ratio_to_plain=statistics.median(t / p for t, p in zip(times, plain_times[-len(times) :], strict=True)),
        peak_bytes=step.peak_in_fresh_process(name, batch, tokens, dtype)["peak_bytes"],
    )
    if name == "fastguard" and dtype == torch.float32:
        ours = gradients(model, run)
        exact = gradients(model, step.step("fastguard exact", model, harmful, harmless))
        errors = {k: float((ours[k] - exact[k]).norm() / exact[k].norm()) for k in exact}
        worst = max(errors, key=errors.get)
        benchmark.extra_info.update(worst_gradient_error=errors[worst], worst_gradient=worst)

"""The steps of the nested defenses on SmolLM2 with real text, against the model passes that their mathematics needs.

Every round times the bare passes immediately before the defense: the ratio is taken pair by pair, so that a drifting
machine moves both. One round of the published algorithm, and one of the passes through fastguard's own loss, stand
beside them, each next to bare passes. Peak memory comes from processes of their own. What a step does besides model
passes is listed with its milliseconds and bytes (docs/performance.md has the floors).
"""

import gc
import statistics
import time

import pytest
import torch

import measure
from end_to_end import nested_step

ROUNDS = {"tar": 2, "booster": 2, "vaccine": 2}
TITLES = {
    "tar": f"TAR outer step, K = {nested_step.INNER}, read every {nested_step.EVERY}",
    "booster": "Booster step",
    "vaccine": "Vaccine step",
}
SHAPES = {"tar": "4 x 64 tokens, retain 8 x 64", "booster": "4 x 128 tokens, twice", "vaccine": "4 x 128 tokens"}


@pytest.fixture(scope="module")
def loaded():
    return nested_step.load()


@pytest.fixture(scope="module")
def bandwidth():
    """Bytes a second of torch's copy between arrays that no cache holds: what element-wise passes are held against."""
    a, b = (torch.ones(2**26) for _ in range(2))
    return 2 * a.numel() * a.element_size() / measure.median_seconds(lambda: b.copy_(a), 7)


@pytest.fixture(scope="module")
def activations():
    """By method: peak above the model of one forward and backward of the largest batch, minus its gradients."""
    found: dict[int, int] = {}

    def of(method):
        tokens = nested_step.TOKENS[method]
        if tokens not in found:
            one = nested_step.peak_in_fresh_process(method, "passes")
            found[tokens] = one["peak_bytes"] - one["parameter_bytes"]
        return found[tokens]

    return of


def timed(run):
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gradients(model):
    """The model's gradients, which are then its no longer."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def error(ours, theirs):
    """Of the gradient over all parameters, relative."""
    squares = sum(float((ours[name] - g).norm() ** 2) for name, g in theirs.items())
    return (squares / sum(float(g.norm() ** 2) for g in theirs.values())) ** 0.5


@pytest.mark.parametrize("name", ["fastguard"])
@pytest.mark.parametrize("method", nested_step.METHODS)
def test_nested_step(benchmark, loaded, bandwidth, activations, method, name):
    model, tokenizer = loaded
    work = nested_step.Work.of(method, tokenizer)
    rates = {"bandwidth": bandwidth, "gemm_rate": measure.gemm_rate(512, 576, 1536, torch.float32)}
    run = {other: nested_step.step(method, other, model, work) for other in ("passes", name)}
    run[name]()  # the first step of a process pays for its memory: Booster's took a twelfth longer than its second
    model.zero_grad(set_to_none=True)

    beside = {"published": [timed(nested_step.step(method, "published", model, work))]}
    theirs = gradients(model)
    bare, parts = [timed(run["passes"])], []
    model.zero_grad(set_to_none=True)
    beside["passes, fused head"] = [timed(nested_step.step(method, "passes, fused head", model, work))]

    def before():
        model.zero_grad(set_to_none=True)
        bare.append(timed(run["passes"]))
        model.zero_grad(set_to_none=True)
        parts.append(nested_step.Parts().__enter__())

    def after():
        parts[-1].__exit__()

    benchmark.group = f"{TITLES[method]}, SmolLM2-135M, {SHAPES[method]}, float32"
    benchmark.pedantic(run[name], setup=before, teardown=after, rounds=ROUNDS[method])
    times = list(benchmark.stats.stats.data)
    difference = error(gradients(model), theirs)

    size = nested_step.parameter_bytes(model)
    bound = nested_step.bound(method, size, activations(method))
    peaks = {n: nested_step.peak_in_fresh_process(method, n)["peak_bytes"] for n in (name, "published")}
    rows = [nested_step.row("passes", bare, 1.0, size + activations(method))]
    rows += [nested_step.row(n, s, s[0] / bare[0], peaks.get(n)) for n, s in beside.items()]
    rows[0]["fraction_of_gemm_rate"] = nested_step.flops(method) / rows[0]["seconds"]["median"] / rates["gemm_rate"]
    benchmark.extra_info.update(
        ratio_to_plain=statistics.median(t / p for t, p in zip(times, bare[1:], strict=True)),
        peak_bytes=peaks[name],
        bound_bytes=bound,
        gradient_error=[difference],
        parts=[p | {"copy_seconds": p["bytes"] / bandwidth} for p in parts[-1].rows()],
        pass_flops=nested_step.flops(method),
        **rates,
        beside=rows,
    )

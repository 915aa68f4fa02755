"""The steps of defenses on SmolLM2 with real text, against the model passes that their cost on paper names.

    python benchmarks/run.py --methods tar,booster benchmarks/end_to_end/bench_nested_steps.py

Without ``--methods`` those whose step has more than one pass. Every round times the bare passes immediately before the
defense: the ratio is taken pair by pair, so that a drifting machine moves both. One round of the published algorithm,
where tests/defenses has it, and one of the passes through fastguard's own loss, stand beside them, each next to bare
passes. Peak memory comes from processes of their own. What a step reports besides model passes (``nested.profile``) is
listed with its milliseconds and bytes (docs/performance.md has the floors).
"""

import gc
import statistics
import time

import pytest
import torch

import measure
from end_to_end import nested_step
from fastguard.nested import profile

ROUNDS = 2


def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames:
        named = metafunc.config.getoption("methods")
        metafunc.parametrize("method", named.split(",") if named else nested_step.default())


@pytest.fixture(scope="module")
def loaded():
    return nested_step.load()


@pytest.fixture(scope="module")
def bandwidth():
    """Bytes a second of torch's copy between arrays that no cache holds: what element-wise passes are held against."""
    a, b = (torch.ones(2**26) for _ in range(2))
    return 2 * a.numel() * a.element_size() / measure.median_seconds(lambda: b.copy_(a), 7)


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
def test_nested_step(benchmark, loaded, bandwidth, method, name):
    model, tokenizer = loaded
    job = nested_step.Job.of(method)
    texts = nested_step.streams(job, tokenizer)
    architecture = nested_step.architecture_of(model)
    recipe = job.recipe(architecture)
    size = nested_step.parameter_bytes(model)
    rates = {"bandwidth": bandwidth, "gemm_rate": measure.gemm_rate(512, 576, 1536, torch.float32)}
    run = {other: nested_step.step(job, other, model, texts) for other in ("passes", name)}
    run[name]()  # the first step of a process pays for its memory: Booster's took a twelfth longer than its second
    model.zero_grad(set_to_none=True)

    beside, peaks, theirs = {}, {}, None
    left_out = nested_step.no_published(method)
    if not left_out:
        beside["published"] = [timed(nested_step.step(job, "published", model, texts))]
        peaks["published"] = nested_step.peak_in_fresh_process(job, "published")["peak_bytes"]
        theirs = gradients(model)
    bare, parts = [timed(run["passes"])], []
    model.zero_grad(set_to_none=True)
    beside["passes, fused head"] = [timed(nested_step.step(job, "passes, fused head", model, texts))]

    def before():
        model.zero_grad(set_to_none=True)
        bare.append(timed(run["passes"]))
        model.zero_grad(set_to_none=True)

    def once():
        with profile.listening() as found:
            run[name]()
        parts.append(found)

    benchmark.group = f"{job.title}, SmolLM2-135M, {job.samples} x {job.tokens} tokens, float32"
    benchmark.pedantic(once, setup=before, rounds=ROUNDS)
    times = list(benchmark.stats.stats.data)
    ours = gradients(model)

    alone = nested_step.peak_in_fresh_process(job, "passes")["peak_bytes"]
    pass_flops = nested_step.flops(recipe, architecture, job.tokens)
    rows = [nested_step.row("passes", bare, 1.0, alone)]
    rows += [nested_step.row(n, s, s[0] / bare[0], peaks.get(n)) for n, s in beside.items()]
    rows[0]["fraction_of_gemm_rate"] = pass_flops / rows[0]["seconds"]["median"] / rates["gemm_rate"]
    benchmark.extra_info.update(
        ratio_to_plain=statistics.median(t / p for t, p in zip(times, bare[1:], strict=True)),
        peak_bytes=nested_step.peak_in_fresh_process(job, name)["peak_bytes"],
        bound_bytes=nested_step.bound(recipe, size),
        parts=[p | {"copy_seconds": p["bytes"] / bandwidth} for p in parts[-1].rows()],
        pass_flops=pass_flops,
        **({"left_out": left_out} if theirs is None else {"gradient_error": [error(ours, theirs)]}),
        **rates,
        beside=rows,
    )

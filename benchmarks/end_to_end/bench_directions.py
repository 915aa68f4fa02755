"""Estimation, selection, ablated generation and the streamed edit of directions, on SmolLM2 with the demo's prompts.

Every round times the floor (bare forwards without the head, generation without ablation, a copy of the shards)
immediately before fastguard: the ratio is taken pair by pair, so that a drifting machine moves both. The published
procedures run once. Peak memory of the estimation comes from processes of their own.
"""

import gc
import statistics
import time

import pytest
import torch

import measure
from end_to_end import directions_work as work
from end_to_end.nested_step import row
from fastguard import directions

ROUNDS = 3
GENERATED_ROUNDS = 5


@pytest.fixture(scope="module")
def loaded():
    return work.load()


@pytest.fixture(scope="module")
def bandwidth():
    """Bytes a second that torch reads of arrays that no cache holds: what a decoding step is held against."""
    a = torch.ones(2**27)
    return a.nbytes / measure.median_seconds(a.sum, 7)


def timed(run):
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(benchmark, floor, run, rounds):
    """Times of the floor and of the contender, and the median of their ratios."""
    floors = []
    benchmark.pedantic(run, setup=lambda: floors.append(timed(floor)), rounds=rounds)
    times = list(benchmark.stats.stats.data)
    return floors[-rounds:], times, statistics.median(t / f for t, f in zip(times, floors[-rounds:], strict=True))


@pytest.mark.parametrize("name", ["fastguard"])
def test_estimation(benchmark, loaded, name):
    model, corpus = loaded
    harmful, harmless = work.instructions(corpus, work.PROMPTS)
    contender = {n: work.estimation(n, model, harmful, harmless) for n in ("bare", "published", name)}
    rate = measure.gemm_rate(work.BATCH * harmful[0]["input_ids"].shape[1], 576, 1536, torch.float32)
    for batches in (harmful[:1], harmless[:1]):
        work.estimation("bare", model, batches, [])()
    found = {}

    def keep(n):
        return lambda: found.__setitem__(n, contender[n]())

    layers = len(model.model.layers)
    benchmark.group = (
        f"directions: estimation on 2 x {work.PROMPTS} prompts, {layers} layers x {work.POSITIONS} positions, "
        "SmolLM2-135M, float32"
    )
    published = [timed(keep("published"))]
    floors, times, ratio = paired(benchmark, contender["bare"], keep(name), ROUNDS)
    scale = float(found["published"].abs().max())
    error = float((found[name].double() - found["published"]).abs().max()) / scale
    assert error < 1e-4  # the published hooks leave the positions of left-padded tokens to the model
    flops = {n: work.body_flops(model, [*harmful, *harmless], layers - (n == name)) for n in ("bare", name)}
    rows = [
        row("bare forward, no head", floors, 1.0, work.peak_in_fresh_process("estimate", "bare")),
        row("published", published, published[0] / floors[0], work.peak_in_fresh_process("estimate", "published")),
    ]
    rows[0]["fraction_of_gemm_rate"] = flops["bare"] / statistics.median(floors) / rate
    benchmark.extra_info.update(
        ratio_to_plain=ratio,
        peak_bytes=work.peak_in_fresh_process("estimate", name),
        fraction_of_gemm_rate=flops[name] / statistics.median(times) / rate,
        flops=flops, gemm_rate=rate, difference_to_published=error, beside=rows,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fastguard"])
def test_selection(benchmark, loaded, name):
    """SmolLM2 refuses too little for the paper's filters, which nothing passes: others stand in for them."""
    model, corpus = loaded
    found = directions.estimate(model, *work.instructions(corpus, work.BATCH), positions=work.POSITIONS)
    harmful, harmless = work.instructions(corpus, work.VALIDATION, work.PROMPTS)
    case = model, found, harmful, harmless, work.refusal_tokens(corpus)
    outcome, seconds = {}, {}

    def run(key, contender, **filters):
        chooses = work.selection(contender, *case, **filters)
        seconds[key] = timed(lambda: outcome.__setitem__(key, chooses()))

    layers = len(model.model.layers)
    benchmark.group = (
        f"directions: selection among {layers} layers x {work.POSITIONS} positions, 2 x {work.VALIDATION} prompts, "
        "SmolLM2-135M, float32"
    )
    benchmark.pedantic(run, ("all", name), work.NO_FILTER, rounds=1)
    run("published", "published")
    tables = outcome["published"]
    filters = work.half(tables)
    run("half", name, **filters)
    for key, limits in (("all", work.NO_FILTER), ("half", filters)):
        mine, (row_of, layer) = outcome[key], work.chosen(tables, **limits)
        assert (found.positions.index(mine.position), mine.layer) == (row_of, layer)
        for ours, theirs in zip((mine.refusal, mine.kl, mine.steering), tables, strict=True):
            asked = ~ours.isnan()
            torch.testing.assert_close(ours[asked], theirs[asked], rtol=1e-3, atol=1e-3)
    forwards = {key: outcome[key].forwards for key in ("all", "half")}
    forwards["published"] = (3 * layers * work.POSITIONS + 1) * work.VALIDATION
    benchmark.extra_info.update(
        ratio_to_plain=seconds["all"] / seconds["published"],
        forwards=forwards,
        beside=[
            row("published", [seconds["published"]], 1.0),
            row("fastguard, half pass each filter", [seconds["half"]], seconds["half"] / seconds["published"]),
        ],
    )


@pytest.mark.parametrize("name", ["ablated"])
@pytest.mark.parametrize("directions_count", [1, 4])
@pytest.mark.parametrize("samples", [1, 8])
def test_generation(benchmark, loaded, bandwidth, samples, directions_count, name):
    model, corpus = loaded
    untouched, _ = work.load()  # without hooks
    (prompts,), _ = work.instructions(corpus, samples, work.PROMPTS)
    rows = torch.randn(directions_count, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plain, run = (work.generation(m, prompts) for m in (untouched, model))
    stream = directions.Stream(model)
    plain()

    def ablated():
        with stream.ablated(rows):
            run()

    ablated()
    benchmark.group = (
        f"directions: {work.TOKENS} tokens generated with cache, {samples} prompt{'s' if samples > 1 else ''}, "
        f"{directions_count} direction{'s' if directions_count > 1 else ''}, SmolLM2-135M, float32"
    )
    floors, times, ratio = paired(benchmark, plain, ablated, GENERATED_ROUNDS)
    stream.close()
    weights = sum(p.nbytes for p in model.parameters())  # the head is the embedding
    floor = work.TOKENS * weights / bandwidth
    benchmark.extra_info.update(
        ratio_to_plain=ratio, fraction_of_bandwidth=floor / statistics.median(times), bandwidth=bandwidth,
        floor_bytes=work.TOKENS * weights,
        beside=[row("as it is", floors, 1.0) | {"fraction_of_bandwidth": floor / statistics.median(floors)}],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["fastguard"])
def test_streamed_edit(benchmark, tmp_path, name):
    basis = directions.orthonormalise(torch.randn(1, 576, generator=torch.Generator().manual_seed(0)))
    runs = {n: work.editing(n, basis, tmp_path) for n in ("copy", "copy, SHA-256", name)}
    benchmark.group = "directions: streamed ablation of SmolLM2-135M's shards, float32"
    runs["copy"]()
    hashed = [timed(runs["copy, SHA-256"]) for _ in range(ROUNDS)]
    floors, times, ratio = paired(benchmark, runs["copy"], runs[name], ROUNDS)
    moved = 2 * sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
    rows = [
        row("copy", floors, 1.0),
        row("copy, SHA-256", hashed, statistics.median(hashed) / statistics.median(floors)),
    ]
    benchmark.extra_info.update(
        ratio_to_plain=ratio, bytes_moved=moved, bytes_per_second=moved / statistics.median(times), beside=rows
    )

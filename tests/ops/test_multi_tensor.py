"""multi_tensor against its float64 specification, on every backend this machine has."""

import itertools

import pytest
import torch

import fastguard.ops.multi_tensor as multi
from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.bench.agreement import EPS
from fastguard.ops.multi_tensor import accumulate_, adamw_, copy_, dot, perturb_, reference, squared_norm

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Shapes and why: no dimension; one element; none; no multiple of a vector; a vector; two blocks; two spans
SHAPES = [(), (1,), (0,), (3, 0), (33, 5), (64,), (7, 300), (2, 40000)]

ADAMW = dict(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def draw(dtypes, scale=1.0):
    """Tensors of all SHAPES, two of them unaligned and one not contiguous, in the dtypes one after the other."""
    dtype = itertools.cycle(dtypes)
    tensors = [torch.randn(shape, dtype=torch.float64).mul_(scale).to(next(dtype)) for shape in SHAPES]
    tensors += [torch.randn(n + 3).mul_(scale).to(next(dtype))[3:] for n in (5, 70001)]
    return [*tensors, torch.randn(40, 30).mul_(scale).to(next(dtype)).t()]


def clones(tensors, dtype=None):
    """Copies that keep strides, so that what is not contiguous stays so."""
    return [t.clone(memory_format=torch.preserve_format).to(dtype or t.dtype) for t in tensors]


def arithmetic(*tensors):
    """The rounding error of the arithmetic on these tensors."""
    return EPS[torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32]


def assert_rounded(name, actual, exact, slack):
    """``actual`` is ``exact`` (float64) rounded to its dtype, after an arithmetic that may be off by ``slack``."""
    info = torch.finfo(actual.dtype)
    bound = 0.5 * (1 + 2**-6) * info.eps * exact.abs() + info.tiny * info.eps + slack
    excess = ((actual.double() - exact).abs() / bound).max() if exact.numel() else torch.zeros(())
    assert float(excess) <= 1, f"{name}: {float(excess):.2f} times the error that rounding explains"


def assert_all_rounded(name, actual, exact, slack):
    """Every tensor of a list, and spoiled versions of the larger ones are caught."""
    for i, (a, e, s) in enumerate(zip(actual, exact, slack, strict=True)):
        assert_rounded(f"{name}[{i}]", a, e, s)
        if a.numel() > 1:
            assert_catches_spoiled(lambda x, e=e, s=s: assert_rounded(name, x, e, s), a)


@pytest.mark.parametrize("dtypes", [[d] for d in DTYPES] + [DTYPES, DTYPES[1:]], ids=str)
def test_sums(on_backend, dtypes):
    a, b = draw(dtypes), draw(dtypes[1:] + dtypes[:1])
    for name, value, exact, scale in (
        ("squared_norm", squared_norm(a), reference.squared_norm(a), reference.squared_norm(a)),
        ("dot", dot(a, b), reference.dot(a, b), reference.dot([t.abs() for t in a], [t.abs() for t in b])),
    ):
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        assert value.dtype == wide and value.shape == ()
        eps = EPS[wide] if dtypes == [wide] else EPS[torch.float32]
        assert abs(float(value) - float(exact)) <= 4 * eps * float(scale), name
        assert abs(float(value) / 2 - float(exact)) > 4 * eps * float(scale), "a halved sum would pass"


def test_a_long_sum_is_good_to_fp32_rounding(on_backend):
    """Four million squares: a running fp32 sum is off by 1e-3, and bf16 values have as much right to it."""
    for dtype in (torch.float32, torch.bfloat16):
        x = [(torch.randn(2**22) * 1e-3 + 1).to(dtype)]
        exact = float(reference.squared_norm(x))
        assert abs(float(squared_norm(x)) - exact) <= (1.01 if on_backend == "cpu" else 8) * 2**-24 * exact


def test_nothing_to_sum(on_backend):
    for empty in ([], [torch.empty(0)], [torch.empty(3, 0, dtype=torch.bfloat16)]):
        assert float(squared_norm(empty)) == 0 and squared_norm(empty).dtype == torch.float32
        assert float(dot(empty, empty)) == 0
        assert perturb_(empty, empty, 1.0).tolist() == [0, 0, 0]
        accumulate_(empty, empty, 1.0)
        adamw_(empty, empty, empty, empty, 1, **ADAMW)
        copy_(empty, empty)


def test_sums_show_nan_and_inf(on_backend):
    for dtype in DTYPES:
        x = [torch.ones(5), torch.ones(100, dtype=dtype)]
        x[1][77] = float("inf")
        assert float(squared_norm(x)) == float("inf")
        x[1][3] = float("nan")
        assert squared_norm(x).isnan() and dot(x, x).isnan()
        assert perturb_([torch.ones(100)], x[1:], 0.1).isnan().tolist() == [True] * 3


@pytest.mark.parametrize("by_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("wide", [None, torch.float32, torch.float64], ids=["same", "fp32", "fp64"])
def test_accumulate(on_backend, wide, by_tensor):
    tensors = draw(DTYPES)
    accumulators = draw(DTYPES if wide is None else [wide])
    start, exact = clones(accumulators), clones(accumulators, torch.float64)
    accumulate_(accumulators, tensors, torch.tensor(-0.37) if by_tensor else -0.37)
    weight = float(torch.tensor(-0.37)) if by_tensor else -0.37
    reference.accumulate_(exact, tensors, weight)
    slack = [2 * arithmetic(a, t) * (a.double().abs() + t.double().abs()) for a, t in zip(start, tensors, strict=True)]
    assert_all_rounded("accumulators", accumulators, exact, slack)


def assert_stats(stats, old, new, directions, scale, through=None):
    """The three sums, recomputed in float64 from what was written."""
    want = torch.zeros(3, dtype=torch.float64)
    for before, after, d in zip(old, new, directions, strict=True):
        intended = scale * d.double()
        realised = after.to(through or after.dtype).double() - before.to(through or before.dtype).double()
        want += torch.stack([intended.pow(2).sum(), realised.pow(2).sum(), (intended * realised).sum()])
    rtol = 1e-6

    def check(s):
        torch.testing.assert_close(s.double(), want, rtol=rtol, atol=rtol * float(want[0] * want[1]) ** 0.5)

    # A step without rounding has three equal sums, which no shuffling changes.
    if float(want.min()) < (1 - 1e-5) * float(want.max()):
        assert_catches_spoiled(check, stats)
    check(stats)


# dtypes of tensors, directions and (None: the tensors themselves) what the step starts from
PERTURBED = [
    ([torch.float32], [torch.float32], None),
    ([torch.float32], [torch.float32], [torch.float32]),
    ([torch.bfloat16], [torch.bfloat16], None),
    ([torch.bfloat16], [torch.bfloat16], [torch.bfloat16]),
    ([torch.bfloat16], [torch.bfloat16], [torch.float32]),
    ([torch.float32, torch.bfloat16, torch.float64, torch.float16], [torch.bfloat16, torch.float32], None),
    ([torch.float16, torch.bfloat16, torch.float64], [torch.bfloat16, torch.float32], [torch.float32]),
]


@pytest.mark.parametrize("through", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dtypes", "direction", "source"), PERTURBED, ids=str)
@pytest.mark.parametrize("by_tensor", [False, True], ids=["number", "tensor"])
def test_perturb(on_backend, dtypes, direction, source, through, by_tensor):
    scale = 0.125 if by_tensor else 0.11
    tensors, directions = draw(dtypes), draw(direction)
    masters = tensors
    if source is not None:
        masters = [(t.double() + 1e-2 * torch.randn(t.shape)).to(m.dtype) for t, m in zip(tensors, draw(source))]
    old, base, exact = clones(tensors), clones(masters), clones(masters, torch.float64)
    reference.perturb_(exact, directions, scale)
    given = torch.tensor(scale) if by_tensor else scale
    stats = perturb_(tensors, directions, given, source=None if source is None else masters, through=through)
    slack = [
        2 * arithmetic(t, d, b) * (b.double().abs() + d.double().abs())
        for t, d, b in zip(old, directions, base, strict=True)
    ]
    assert_all_rounded("tensors", tensors, exact, slack)
    assert stats.shape == (3,)
    assert stats.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert_stats(stats, old, tensors, directions, scale, through)


def test_perturbation_stats_of_one_dtype(on_backend):
    for dtype in DTYPES:
        tensors, directions = draw([dtype]), draw([dtype])
        old = clones(tensors)
        stats = perturb_(tensors, directions, 0.11)
        assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_stats(stats, old, tensors, directions, 0.11)


def cosine(stats):
    return float(stats[2] / (stats[0] * stats[1]).sqrt().clamp_min(1e-30))


def test_a_small_step_is_lost_in_bf16_and_said_to_be(on_backend):
    """Steps of 1/100 of the spacing: in place nothing moves; from masters the step survives on average.

    Weights near 0.02 have a spacing of 1.2e-4 in bf16. What is written from the masters is the rounding of
    master + step: its difference from the rounded master is right in the mean, with noise in place of the lost step.
    """
    masters = [torch.rand(400, 500) * 0.015 + 0.0165]
    directions = [torch.randn(400, 500)]
    step = 1.2e-6
    published = [m.bfloat16() for m in masters]
    stats = perturb_(published, directions, step)
    assert cosine(stats) < 0.1 and float(stats[1] / stats[0]) < 0.1
    ours = [m.bfloat16() for m in masters]
    stats = perturb_(ours, directions, step, source=masters)
    assert abs(float(stats[2] / stats[0]) - 1) < 0.15, "unbiased along the direction"
    weights = clones(masters)
    stats = perturb_(weights, directions, step)
    assert cosine(stats) > 0.99 and abs(float(stats[1] / stats[0]) - 1) < 0.01, "fp32 weights hold the step"
    stats = perturb_(clones(masters), directions, step, through=torch.bfloat16)
    assert cosine(stats) < 0.3, "but a forward that casts them to bf16 does not see it"


@pytest.mark.parametrize(
    ("params", "grads", "states"),
    [([d], [d], [d]) for d in DTYPES]
    + [
        (DTYPES[2:], [torch.bfloat16], [torch.float32]),
        ([torch.bfloat16], [torch.float32], [torch.bfloat16]),
        (DTYPES[:2], [torch.float16], [torch.bfloat16, torch.float32]),
    ],
    ids=str,
)
def test_adamw_step(on_backend, params, grads, states):
    """One step from the middle of a run, each tensor rounded once."""
    p, g, m = draw(params), draw(grads), draw(states)
    v = [t.square() for t in draw(states)]
    exact = [clones(x, torch.float64) for x in (p, g, m, v)]
    eps = [arithmetic(*group) for group in zip(p, g, m, v, strict=True)]
    sizes = [torch.maximum(a.abs(), b.abs()) for a, b in zip(exact[1], exact[2], strict=True)]
    reference.adamw_(*exact, 3, **ADAMW)
    adamw_(p, g, m, v, 3, **ADAMW)
    assert_all_rounded("exp_avgs", m, exact[2], [4 * e * s for e, s in zip(eps, sizes, strict=True)])
    assert_all_rounded("exp_avg_sqs", v, exact[3], [4 * e * x.abs() for e, x in zip(eps, exact[3], strict=True)])
    root = [(x / (1 - 0.95**3)).sqrt() + 1e-8 for x in exact[3]]
    update = [0.02 * (s + a.abs()) / r for s, a, r in zip(sizes, exact[2], root, strict=True)]
    slack = [e * (2 * x.abs() + 16 * u) for e, x, u in zip(eps, exact[0], update, strict=True)]
    assert_all_rounded("params", p, exact[0], slack)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(on_backend, dtype, weight_decay):
    """Five steps beside ``torch.optim.AdamW``: equal to 1e-12 in float64; in fp32 as near to float64 as torch is."""
    options = dict(lr=1e-2, eps=1e-6, weight_decay=weight_decay)
    start = [torch.randn(31, 7, dtype=torch.float64), torch.randn(1500, dtype=torch.float64)]
    gradients = [[torch.randn_like(t) * 10.0**-k for t in start] for k in range(5)]

    def torchs(wide):
        params = [torch.nn.Parameter(t.to(wide)) for t in start]
        optimizer = torch.optim.AdamW(params, betas=(0.9, 0.99), foreach=False, **options)
        for step in gradients:
            for p, g in zip(params, step, strict=True):
                p.grad = g.to(wide)
            optimizer.step()
        state = [optimizer.state[p] for p in params]
        return [p.detach() for p in params], [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state]

    mine = ([t.to(dtype) for t in start], [torch.zeros_like(t, dtype=dtype) for t in start])
    mine = (*mine, clones(mine[1]))
    for step, g in enumerate(gradients, 1):
        adamw_(mine[0], [x.to(dtype) for x in g], *mine[1:], step, beta1=0.9, beta2=0.99, **options)
    for name, got, want, peer in zip(("p", "m", "v"), mine, torchs(torch.float64), torchs(dtype), strict=True):
        for x, exact, same in zip(got, want, peer, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(x, exact, rtol=1e-12, atol=1e-14)
            else:
                assert_catches_spoiled(lambda t, e=exact, s=same: assert_agrees(name, t, e, s, ulps=4), x)


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


def any_bits(n, dtype):
    """Every bit pattern, NaN payloads among them."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (n * size,), dtype=torch.uint8).view(dtype)


def test_copy_is_exact_to_the_bit(on_backend):
    kinds = [*DTYPES, torch.int64, torch.uint8, torch.float8_e4m3fn]
    sources = [any_bits(n, kind) for n in (1, 7, 4001) for kind in kinds]
    assert any(t.isnan().any() for t in sources if t.dtype == torch.bfloat16)
    sources += [t[1:] for t in sources if t.numel() > 1] + [any_bits(600, torch.bfloat16).view(20, 30).t()]
    sources += [torch.rand(33) < 0.5, torch.empty(0), torch.empty(4, 0, dtype=torch.int32)]
    destinations = [torch.zeros_like(t) for t in sources]
    copy_(destinations, sources)
    for d, s in zip(destinations, sources, strict=True):
        assert torch.equal(bits(d), bits(s))


def test_copy_of_more_than_the_caches_hold(on_backend):
    """Past 16 MB stores bypass the caches; the ends of unaligned tensors do not."""
    sources = [any_bits(n, torch.bfloat16) for n in (5, 2**22 + 3, 2**22 + 1, 17)]
    room = [torch.zeros(t.numel() + 14, dtype=t.dtype) for t in sources]
    copy_([r[7:-7] for r in room], sources)
    for r, s in zip(room, sources, strict=True):
        assert torch.equal(bits(r[7:-7]), bits(s))
        assert not r[:7].any() and not r[-7:].any()


def test_results_do_not_depend_on_threads_or_repetition(on_backend):
    tensors = [torch.randn(300_000), torch.randn(77), *(torch.randn(1000) for _ in range(50)), torch.randn(123_457)]
    directions = [torch.randn_like(t).bfloat16() for t in tensors]

    def run():
        p, m = clones(tensors), [torch.zeros_like(t) for t in tensors]
        v = clones(m)
        stats = [perturb_(p, directions, 0.01), squared_norm(p), dot(p, directions)]
        accumulate_(m, directions, 0.3)
        adamw_(p, directions, m, v, 1, **ADAMW)
        return [*stats, *p, *m, *v]

    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    # the portable backend's sums are torch's, which may split a large tensor by threads
    same = results[1:] if on_backend == "cpu" else results[3:]
    for other in same:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_parameters_that_require_grad(on_backend):
    """Leaves may be written to, no graph is recorded, and autograd notices that a saved tensor has changed."""
    weight = torch.nn.Parameter(torch.randn(4, 4))
    direction = torch.randn(4, 4, requires_grad=True)
    loss = (torch.randn(3, 4, requires_grad=True) @ weight).square().sum()
    stats = perturb_([weight], [direction], 0.1)
    assert not stats.requires_grad and weight.is_leaf and weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    versions = []
    m, v = [torch.zeros(4, 4)], [torch.zeros(4, 4)]
    for call in (
        lambda: accumulate_([weight], [direction], 0.5),
        lambda: adamw_([weight], [direction], m, v, 1, **ADAMW),
        lambda: copy_([weight], [direction]),
    ):
        call()
        versions.append(weight._version)
    assert versions == sorted(set(versions))


class Sharded(torch.Tensor):
    """Stands for a DTensor."""

    def to_local(self):
        return self


X, Y = torch.ones(3), torch.ones(2)
WRONG = {
    "a tensor for a list": (lambda: squared_norm(X), r"tensors: expected a list"),
    "lengths": (lambda: dot([X], [X, X]), r"b: expected 1 tensors, as many as a, got 2"),
    "shapes": (lambda: dot([X, X], [X, Y]), r"b\[1\]: expected the shape of its partner in a, got \(2,\)"),
    "source's length": (lambda: perturb_([X], [X], 1.0, source=[]), r"source: expected 1 tensors"),
    "dtype": (lambda: squared_norm([X, X.long()]), r"tensors\[1\]: expected a dtype of .*, got torch.int64"),
    "layout": (lambda: squared_norm([X.to_sparse()]), r"tensors\[0\]: expected a strided tensor"),
    "device": (lambda: dot([X], [X.to("meta")]), r"b: expected the device of a, cpu, got meta"),
    "devices": (lambda: squared_norm([X, X.to("meta")]), r"tensors\[1\]: expected device cpu, got meta"),
    "DTensor": (lambda: squared_norm([X.as_subclass(Sharded)]), r"tensors: expected local tensors"),
    "narrow accumulator": (
        lambda: accumulate_([X.bfloat16()], [X], 1.0), r"accumulators\[0\]: expected .*, got torch.bfloat16",
    ),
    "weight": (lambda: accumulate_([X], [X], torch.ones(1)), r"weight: expected a number or a 0-dim"),
    "integer scale": (lambda: perturb_([X], [X], torch.tensor(1)), r"scale: expected a number or a 0-dim"),
    "scale's device": (
        lambda: perturb_([X], [X], torch.ones((), device="meta")), r"scale: expected device cpu or cpu, got meta",
    ),
    "through": (lambda: perturb_([X], [X], 1.0, through=torch.int8), r"through: expected a dtype"),
    "step": (lambda: adamw_([X], [X], [X], [X], 0, **ADAMW), r"step: expected 1 or more, got 0"),
    "beta": (lambda: adamw_([X], [X], [X], [X], 1, lr=1.0, beta1=1.0), r"beta1: expected 0 <= beta1 < 1, got 1.0"),
    "lr": (lambda: adamw_([X], [X], [X], [X], 1, lr=float("nan")), r"lr: expected 0 or more, got nan"),
    "copy's dtypes": (lambda: copy_([X], [X.double()]), r"sources\[0\]: expected the dtype of destinations\[0\]"),
    "tied": (lambda: accumulate_([X, X], [X, X], 1.0), r"accumulators: expected each tensor once"),
    "overlap": (lambda: accumulate_([torch.ones(1).expand(3)], [X], 1.0), r"accumulators: expected memory of its own"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def arguments():
    """Arguments of each registered op."""
    a, b = draw([torch.float32, torch.bfloat16]), draw([torch.float32])
    zeros = [torch.zeros_like(t, dtype=torch.float32) for t in a]
    by = torch.tensor(0.5)
    return {
        "squared_norm": (a,),
        "dot": (a, b),
        "accumulate_": (b, a, 1.0, by),
        "perturb_": (a, b, 0.1, None, b, torch.bfloat16),
        "adamw_": (a, b, zeros, clones(zeros), 1, *ADAMW.values()),
        "copy_": (b, zeros),
    }


@pytest.mark.parametrize("name", multi.__all__)
def test_opcheck(on_backend, name):
    torch.library.opcheck(getattr(torch.ops.fastguard, f"multi_tensor_{name}").default, arguments()[name])


def test_compiles_to_one_graph(on_backend):
    def step(params, grads, masters, m, v):
        accumulate_(m, grads, 0.5)
        stats = perturb_(params, grads, squared_norm(grads).rsqrt(), source=masters, through=torch.bfloat16)
        adamw_(params, grads, m, v, 2, **ADAMW)
        copy_(masters, v)
        return stats, dot(params, grads)

    def inputs():
        torch.manual_seed(3)
        p, g = draw([torch.bfloat16, torch.float32]), draw([torch.float32])
        return p, g, clones(g), clones(g), [t.square() for t in g]

    eager, compiled = inputs(), inputs()
    results = step(*eager), torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for lists in (results, *zip(eager, compiled, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(*lists, strict=True))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu(monkeypatch):
    """The GPU's kernels, proven there or not, agree with the specification, and nothing waits for the device."""
    monkeypatch.setenv("FASTGUARD_BACKEND", "triton")
    tensors, directions = draw([torch.bfloat16, torch.float32]), draw([torch.float32])
    exact = clones(tensors, torch.float64)
    reference.perturb_(exact, directions, 0.5)
    on_gpu = [t.cuda() for t in tensors], [t.cuda() for t in directions]
    scale = torch.tensor(0.5, device="cuda")
    perturb_([t.clone() for t in on_gpu[0]], on_gpu[1], scale)  # compiles
    old = clones(on_gpu[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = perturb_(*on_gpu, scale)
        norm = squared_norm(on_gpu[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    slack = [2 * arithmetic(d) * (t.double().abs() + d.double().abs()) for t, d in zip(tensors, directions)]
    assert_all_rounded("tensors", [t.cpu() for t in on_gpu[0]], exact, slack)
    assert_stats(stats.cpu(), [t.cpu() for t in old], [t.cpu() for t in on_gpu[0]], directions, 0.5)
    torch.testing.assert_close(norm.cpu().double(), reference.squared_norm(directions), rtol=1e-6, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_copies_between_host_and_gpu():
    sources = [any_bits(n, torch.bfloat16) for n in (5, 2**20, 77)]
    device = [torch.zeros_like(t, device="cuda") for t in sources]
    host = [torch.zeros_like(t).pin_memory() for t in sources]
    copy_(device, [t.pin_memory() for t in sources])
    copy_(host, device)
    for h, s in zip(host, sources, strict=True):
        assert torch.equal(bits(h), bits(s))

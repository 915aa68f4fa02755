"""column_norms_ against its specification, on every backend this machine has."""

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.ops.column_norms import column_norms_, reference
from fastguard.ops.segments import runs

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# (B, T, I) and why
SHAPES = {
    "one row": (1, 1, 1),
    "no multiple of a vector, a unit or rows taken together": (4, 11, 70),
    "more features than a chunk": (2, 9, 2100),
    "more rows than a tile": (1, 300, 1000),
}


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def states(width, dtype):
    """sums, least, greatest as they begin."""
    return torch.zeros(width, dtype=dtype), *(torch.full((width,), s * torch.inf, dtype=dtype) for s in (1, -1))


def draw(shape, dtype):
    """Activations whose features differ in scale by orders of magnitude, so that no feature stands for another."""
    scale = torch.logspace(-3, 3, shape[-1], dtype=torch.float64)
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def check(found, want):
    """Each feature by itself, to the precision of the state: a float64 sum, rounded once a call."""

    def agrees(sums):
        ratio = (sums.double() / want).to(found.dtype)
        assert_agrees("sums of squares", ratio, torch.ones_like(want), ulps=4 if found.dtype == torch.float32 else 64)

    assert_catches_spoiled(agrees, found)


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(on_backend, shape, dtype, state):
    """Three batches; the least and the greatest sum of a sample, over all of them."""
    if dtype == torch.float64 and state != dtype:
        pytest.skip("float64 is summed in float64")
    sums, least, greatest = states(shape[-1], state)
    alone = torch.zeros_like(sums)
    batches = [draw(shape, dtype) for _ in range(3)]
    for x in batches:
        column_norms_(sums, x, least=least, greatest=greatest)
        column_norms_(alone, x)
    bounds = torch.arange(shape[0])[:, None] * shape[1] + torch.tensor([0, shape[1]])
    want = torch.cat([reference.squares(x.double(), bounds) for x in batches])
    for found, exact in ((sums, want.sum(0)), (alone, want.sum(0)), (least, want.amin(0)), (greatest, want.amax(0))):
        check(found, exact)


@pytest.mark.parametrize("kind", ["lengths", "offsets", "bounds", "a mask", "a mask with holes"])
def test_rows_that_are_not_chosen_are_never_read(on_backend, kind):
    """They hold NaN. A sample without a token is no sample: the least sum of squares is not its 0."""
    x = draw((4, 10, 70), torch.float32)
    number = torch.tensor([3, 0, 10, 1])
    mask = torch.arange(10) < number[:, None]
    if kind.startswith("a mask"):  # padding on the left
        mask = mask.flip(1)
    if kind.endswith("holes"):
        mask[2, 4:6] = False
    kept = x[mask]
    full, each = x.masked_fill(~mask[..., None], torch.nan), mask.sum(1).tolist()
    given = {
        "lengths": lambda: (full, {"lengths": number.int()}),
        "offsets": lambda: (kept, {"offsets": [0, 3, 3, 13, 14]}),
        "bounds": lambda: (full, {"bounds": torch.stack([number * 0, number], 1) + torch.arange(4)[:, None] * 10}),
    }
    if kind in given:
        rows, options = given[kind]()
    else:
        bounds, compact = runs(mask)
        rows, options = full if compact is None else full.flatten(0, 1)[compact], {"bounds": bounds}
        assert (compact is None) == (kind == "a mask")
    sums, least, greatest = states(70, torch.float64)
    column_norms_(sums, rows, least=least, greatest=greatest, **options)
    want = torch.stack([s.double().square().sum(0) for s in kept.split(each) if len(s)])
    for found, exact in ((sums, want.sum(0)), (least, want.amin(0)), (greatest, want.amax(0))):
        check(found, exact)


def test_a_long_stream_loses_nothing(on_backend):
    """Ten thousand calls, 260,000 tokens of bf16, a mean that never cancels; what bf16 sums lose is shown to fail."""
    calls, tokens, width = 10_000, 26, 16
    state, narrow = torch.zeros(width, dtype=torch.float64), torch.zeros(width)
    published = torch.zeros(width, dtype=torch.bfloat16)
    exact = torch.zeros(width, dtype=torch.float64)
    x = (2 + torch.randn(100, 1, tokens, width)).bfloat16()
    each = x.double().square().sum((1, 2))
    for call in range(calls):
        column_norms_(state, x[call % 100])
        column_norms_(narrow, x[call % 100])
        published += x[call % 100].square().sum((0, 1))
        exact += each[call % 100]
    off = [float(((s.double() - exact) / exact).abs().max()) for s in (state, narrow, published)]
    print(off)
    assert off[0] < 1e-13  # the order in which float64 sums
    assert off[1] < 2e-5  # half a unit in the last place a call
    assert off[2] > 0.5


def test_scales_that_fp32_squares_would_lose(on_backend):
    """Squares below the smallest and above the largest fp32 number, in a float64 state."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([[1e-30, 1e25], [3e-30, -2e25]]).to(dtype)
        sums = torch.zeros(2, dtype=torch.float64)
        column_norms_(sums, x, offsets=[0, 2])
        torch.testing.assert_close(sums, x.double().square().sum(0), rtol=1e-15, atol=0)


def test_any_strides(on_backend):
    x = torch.randn(3, 20, 8)
    views = {
        "a batch in the middle": x.transpose(0, 1).contiguous().transpose(0, 1),
        "features apart": torch.randn(3, 20, 16)[..., ::2],
        "rows apart": torch.randn(3, 20, 16)[..., 5:13],
        "of a graph": torch.randn(3, 20, 8, requires_grad=True),
    }
    for name, view in views.items():
        sums = torch.zeros(8, dtype=torch.float64)
        column_norms_(sums, view, lengths=[20, 1, 4])
        kept = view.detach()[torch.arange(20) < torch.tensor([20, 1, 4])[:, None]]
        torch.testing.assert_close(sums, kept.double().square().sum(0), msg=name)
        assert not sums.requires_grad
    apart = torch.zeros(16, dtype=torch.float64)[::2]
    column_norms_(apart, x)
    torch.testing.assert_close(apart, x.double().square().sum((0, 1)))


def test_what_is_not_finite_is_seen(on_backend):
    x = torch.randn(2, 3, 4)
    x[0, 1, 1], x[1, 0, 2] = float("nan"), float("inf")
    state = states(4, torch.float32)
    for _ in range(2):
        column_norms_(state[0], x, least=state[1], greatest=state[2])
        x = torch.randn(2, 3, 4)
    assert torch.isfinite(state[0]).tolist() == [True, False, False, True]
    for bound in state[1:]:
        assert bound[1].isnan() and torch.isfinite(bound[[0, 3]]).all()
    assert torch.isfinite(state[1][2]) and state[2][2] == torch.inf


def test_nothing_to_take(on_backend):
    sums, least, greatest = states(4, torch.float32)
    x = torch.full((2, 3, 4), torch.nan)
    for rows, options in ((x[:0], {}), (x[:, :0], {}), (x, {"lengths": [0, 0]}), (x[0, :0], {"offsets": [0, 0]})):
        column_norms_(sums, rows, least=least, greatest=greatest, **options)
    assert not sums.any() and (least == torch.inf).all() and (greatest == -torch.inf).all()


def test_opcheck_compile_and_autocast(on_backend):
    x, bounds = torch.randn(3, 4, 10), torch.tensor([[0, 2], [4, 8], [8, 8]])
    op = torch.ops.fastguard.column_norms_
    if on_backend == "portable":
        torch.library.opcheck(op, (*states(10, torch.float32), x, bounds))
        torch.library.opcheck(op, (torch.zeros(10), None, None, x, bounds))

    def run(x, sums, least):
        y = x.relu()
        column_norms_(sums, y, lengths=[2, 4, 0], least=least)
        return sums.sum() + y.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, theirs = states(10, torch.float32)[:2], states(10, torch.float32)[:2]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x, *ours), run(x, *theirs))
    assert all(map(torch.equal, ours, theirs)) and ours[0].all()
    version = ours[0]._version
    run(x, *ours)
    assert ours[0]._version > version


def test_nothing_depends_on_the_threads(on_backend):
    x, threads = draw((5, 40, 1500), torch.float32), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(states(1500, torch.float64))
            column_norms_(found[-1][0], x, least=found[-1][1], greatest=found[-1][2])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


S, X = torch.zeros(4), torch.zeros(2, 3, 4)
ERRORS = {
    "x": ((S, X[0, 0]), {}),
    "x dtype": ((S, X.long()), {}),
    "sums": ((S[:3], X), {}),
    "sums dtype": ((S.bfloat16(), X), {}),
    "sums narrow": ((S, X.double()), {}),
    "sums device": ((S.to("meta"), X), {}),
    "least": ((S, X), {"least": S[:3]}),
    "least dtype": ((S, X), {"least": S.double()}),
    "greatest": ((S, X), {"greatest": S[None]}),
    "lengths": ((S, X), {"lengths": [1]}),
    "lengths range": ((S, X), {"lengths": [1, 4]}),
    "lengths of rows": ((S, X[0]), {}),
    "offsets": ((S, X[0]), {"offsets": [0, 2]}),
    "bounds": ((S, X), {"bounds": torch.tensor([[0, 7]])}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        column_norms_(*arguments, **options)

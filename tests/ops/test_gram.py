"""gram_ against its specification, on every backend this machine has."""

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.ops.gram import gram_, portable, reference
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
    "one block, no multiple of a square": (3, 7, 70),
    "three blocks, the last one narrow": (2, 40, 2 * portable.BLOCK["cpu"] + 5),
    "more rows than are copied at a time": (3, portable.ROWS // 2, 20),
}


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def draw(shape, dtype):
    return (0.5 + torch.randn(shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(on_backend, shape, dtype, state):
    """Three batches; symmetric to the bit after each. bf16 products that torch rounds are checked to be worse."""
    if dtype == torch.float64 and state != dtype:
        pytest.skip("float64 is summed in float64")
    gram, want = (torch.zeros(shape[-1], shape[-1], dtype=d) for d in (state, torch.float64))
    rounded = torch.zeros_like(gram)
    all_rows = torch.arange(shape[0])[:, None] * shape[1] + torch.tensor([0, shape[1]])
    for _ in range(3):
        x = draw(shape, dtype)
        gram_(gram, x)
        assert torch.equal(gram, gram.mT)
        want += reference.gram(x.double(), all_rows)
        rounded += x.flatten(0, 1).mT @ x.flatten(0, 1)
    ulps = 256 if state == torch.float64 else 32  # the specification sums in float64 too
    assert_catches_spoiled(lambda g: assert_agrees("gram", g, want, ulps=ulps), gram)
    if dtype == torch.bfloat16 and shape[-1] > 1:
        with pytest.raises(AssertionError):
            assert_agrees("gram", rounded, want)


@pytest.mark.parametrize("kind", ["lengths", "offsets", "bounds", "a mask", "a mask with holes"])
def test_rows_that_are_not_chosen_are_never_read(on_backend, kind):
    """They hold NaN, which a product with 0 would let through."""
    x = draw((4, 10, 70), torch.float32)
    number = torch.tensor([3, 0, 10, 1])
    mask = torch.arange(10) < number[:, None]
    if kind.startswith("a mask"):  # padding on the left
        mask = mask.flip(1)
    if kind.endswith("holes"):
        mask[2, 4:6] = False
    kept, full = x[mask], x.masked_fill(~mask[..., None], torch.nan)
    if kind == "lengths":
        rows, options = full, {"lengths": number.int()}
    elif kind == "offsets":
        rows, options = kept, {"offsets": [0, 3, 3, 13, 14]}
    elif kind == "bounds":  # in another order, one of them twice
        rows, options = full, {"bounds": torch.tensor([[30, 31], [20, 30], [0, 3], [30, 31], [5, 5]])}
        kept = torch.cat([kept, x[3, :1]])
    else:
        bounds, compact = runs(mask)
        rows, options = full if compact is None else full.flatten(0, 1)[compact], {"bounds": bounds}
    gram = torch.zeros(70, 70, dtype=torch.float64)
    gram_(gram, rows, **options)
    want = kept.double().mT @ kept.double()
    assert_catches_spoiled(lambda g: assert_agrees("gram", g, want), gram)


def test_a_stream_of_bf16_is_not_rounded_between_calls(on_backend):
    """Two thousand calls with a mean that never cancels; a state kept in bf16 is shown to stand still."""
    gram, kept, narrow = torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8).bfloat16()
    exact = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(2000):
        x = (2 + torch.randn(1, 24, 8)).bfloat16()
        gram_(gram, x)
        gram_(kept, x)
        narrow += x[0].mT @ x[0]
        exact += x[0].double().mT @ x[0].double()
    off = [float(((g.double() - exact) / exact).abs().max()) for g in (gram, kept, narrow)]
    assert off[0] < 1e-5 and off[1] < 1e-13 and off[2] > 0.5


def test_any_strides(on_backend):
    views = {
        "a batch in the middle": torch.randn(20, 3, 8).transpose(0, 1),
        "features apart": torch.randn(3, 20, 16)[..., ::2],
        "rows apart": torch.randn(3, 20, 16)[..., 5:13],
        "of a graph": torch.randn(3, 20, 8, requires_grad=True),
    }
    for name, x in views.items():
        gram = torch.zeros(8, 8)
        gram_(gram, x)
        rows = x.detach().flatten(0, 1)
        torch.testing.assert_close(gram, rows.mT @ rows, msg=name)
        assert not gram.requires_grad


def test_what_is_not_finite_is_seen(on_backend):
    x = torch.randn(2, 3, 4)
    x[0, 1, 1] = torch.nan
    gram = torch.zeros(4, 4)
    for _ in range(2):
        gram_(gram, x)
        x = torch.randn(2, 3, 4)
    assert gram[1].isnan().all() and gram[:, 1].isnan().all() and int(gram.isnan().sum()) == 7


def test_nothing_to_take(on_backend):
    gram, x = torch.eye(4), torch.full((2, 3, 4), torch.nan)
    for rows, options in ((x[:0], {}), (x[:, :0], {}), (x, {"lengths": [0, 0]}), (x[0, :0], {"offsets": [0, 0]})):
        gram_(gram, rows, **options)
    assert torch.equal(gram, torch.eye(4))


def test_opcheck_compile_and_autocast(on_backend):
    x, bounds = torch.randn(3, 4, 10), torch.tensor([[0, 2], [4, 8], [8, 8]])
    if on_backend == "portable":
        torch.library.opcheck(torch.ops.fastguard.gram_, (torch.zeros(10, 10), x, bounds))

    def run(x, gram):
        y = x.relu()
        gram_(gram, y, lengths=[2, 4, 0])
        return gram.sum() + y.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, theirs = torch.zeros(10, 10), torch.zeros(10, 10)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x, ours), run(x, theirs))
    assert torch.equal(ours, theirs)
    kept = torch.cat([x[0, :2], x[1]]).relu()
    torch.testing.assert_close(ours, 2 * kept.mT @ kept)
    version = ours._version
    run(x, ours)
    assert ours._version > version


G, X = torch.zeros(4, 4), torch.zeros(2, 3, 4)
ERRORS = {
    "x": ((G, X[0, 0]), {}),
    "x dtype": ((G, X.long()), {}),
    "gram": ((G[:3], X), {}),
    "gram dtype": ((G.bfloat16(), X), {}),
    "gram narrow": ((G, X.double()), {}),
    "gram device": ((G.to("meta"), X), {}),
    "gram strides": ((G.mT, X), {}),
    "lengths": ((G, X), {"lengths": [1]}),
    "lengths range": ((G, X), {"lengths": [1, 4]}),
    "lengths of rows": ((G, X[0]), {}),
    "offsets": ((G, X[0]), {"offsets": [0, 2]}),
    "bounds": ((G, X), {"bounds": torch.tensor([[0, 7]])}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        gram_(*arguments, **options)

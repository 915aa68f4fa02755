"""abs_weight_grad_ against its specification, on every backend this machine has."""

import pytest
import torch
from torch.nn.functional import linear

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.ops import segments
from fastguard.ops.abs_weight_grad import abs_weight_grad_, portable, reference

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("score", "squared", "signed")

# (B, T, O, I) and why
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "one token": (5, 1, 7, 33),
    "one output": (3, 6, 1, 40),
    "one input": (3, 6, 29, 1),
    "several short samples a block, no multiple of a register tile": (40, 13, 31, 35),
    "samples longer than a block": (2, 600, 13, 18),
    "whole register tiles": (2, 9, 42, 64),
    "several tiles of the weight": (2, 5, 410, 1030),
}


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    monkeypatch.setattr(portable, "TILE_BYTES", 20_000)  # so that small weights have several tiles
    return request.param


def draw(b, t, o, i, dtype=torch.float32):
    """grad_out and input whose samples, rows and features differ in scale."""
    scale = torch.rand(b, 1, 1, dtype=torch.float64) + 0.1
    grad_out = torch.randn(b, t, o, dtype=torch.float64) * scale * (torch.rand(o) + 0.2)
    return grad_out.to(dtype), (torch.randn(b, t, i, dtype=torch.float64) + 0.3).to(dtype)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def zeros(o, i, dtype=torch.float32):
    return {name: torch.zeros(o, i, dtype=dtype) for name in NAMES}


def add(states, grad_out, input, **where):
    abs_weight_grad_(states.get("score"), grad_out, input, squared=states.get("squared"), signed=states.get("signed"),
                     **where)  # fmt: skip
    return states


def specified(grad_out, input, bounds=None):
    """The reference's sums by name, in float64."""
    bounds = segments.bounds_of(grad_out) if bounds is None else bounds
    flat = [t.flatten(0, -2).double() for t in (grad_out, input)]
    return dict(zip(NAMES, reference.sums(*flat, bounds), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(on_backend, shape, dtype):
    grad_out, input = draw(*shape, dtype)
    states = add(zeros(*shape[2:], wide(dtype)), grad_out, input)
    torch_s = reference.sums(*(t.flatten(0, 1).to(wide(dtype)) for t in (grad_out, input)), segments.bounds_of(input))
    for name, want, peer in zip(NAMES, specified(grad_out, input).values(), torch_s, strict=True):
        assert_catches_spoiled(
            lambda got, name=name, want=want, peer=peer: assert_agrees(name, got, want, peer), states[name]
        )
        alone = add({name: torch.zeros_like(want, dtype=wide(dtype))}, grad_out, input)
        assert torch.equal(alone[name], states[name])


def test_an_answer_by_hand(on_backend):
    """G_0 = 1 [1, 0] + 2 [-1, 2] = [-1, 4], G_1 = -3 [1, 1] + 1 [2, 0] = [-1, -3]; the states held 10 before."""
    grad_out = torch.tensor([[[1.0], [2.0]], [[-3.0], [1.0]]])
    input = torch.tensor([[[1.0, 0.0], [-1.0, 2.0]], [[1.0, 1.0], [2.0, 0.0]]])
    states = add({name: torch.full((1, 2), 10.0) for name in NAMES}, grad_out, input)
    assert states["score"].tolist() == [[12, 17]]
    assert states["squared"].tolist() == [[12, 35]]
    assert states["signed"].tolist() == [[8, 11]]


def test_it_is_what_autograd_gives_sample_by_sample(on_backend):
    weight = torch.randn(9, 14, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(4, 6, 14, dtype=torch.float64), torch.randint(9, (4, 6))
    outputs = linear(x, weight)
    loss = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="none").view(4, 6)
    each = [torch.autograd.grad(row.mean(), weight, retain_graph=True)[0] for row in loss]
    (grad_out,) = torch.autograd.grad(loss.mean(1).sum(), outputs)
    states = add(zeros(9, 14, torch.float64), grad_out, x)
    for name, want in zip(NAMES, (sum(g.abs() for g in each), sum(g**2 for g in each), sum(each)), strict=True):
        assert_agrees(name, states[name], want)


def test_padding_is_never_read_and_packing_changes_no_bit(on_backend):
    """NaN in the padding on either side; samples without a token, and one longer than a block."""
    lengths = [3, 0, 300, 1, 0, 41]
    grad_out, input = draw(6, 300, 23, 37)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    for left in (False, True):
        mask = torch.arange(300) < torch.tensor(lengths)[:, None]
        mask = mask.flip(1) if left else mask
        spoiled = [torch.where(mask[..., None], t, float("nan")) for t in (grad_out, input)]
        bounds, kept = segments.runs(mask)
        assert kept is None
        padded = add(zeros(23, 37), *spoiled, **({"bounds": bounds} if left else {"lengths": lengths}))
        rows = [t[mask] for t in (grad_out, input)]
        packed = add(zeros(23, 37), *rows, offsets=offsets)
        want = specified(*rows, segments.bounds_of(rows[0], offsets=offsets))
        assert rows[0].shape == (total, 23)
        for name in NAMES:
            assert torch.equal(padded[name], packed[name])
            assert_agrees(name, packed[name], want[name])


def test_bounds_in_any_order_that_share_rows(on_backend):
    """Samples need not follow one another: a row may be in two of them, or a run go on into the next of B."""
    grad_out, input = draw(3, 8, 11, 19)
    for shape in ((3, 8), (24,)):
        dy, x = grad_out.view(*shape, 11), input.view(*shape, 19)
        bounds = torch.tensor([[10, 19], [0, 24], [5, 5], [2, 11]])
        states = add(zeros(11, 19), dy, x, bounds=bounds)
        for name, want in specified(dy, x, bounds).items():
            assert_agrees(name, states[name], want)


@pytest.mark.parametrize("o, i", [(13, 70), (400, 900)])
@pytest.mark.skipif(backend.unavailable("cpu", "cpu") is not None, reason="torch's own products may depend on them")
def test_threads_change_no_bit(o, i):
    grad_out, input = draw(5, 33, o, i)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(add(zeros(o, i), grad_out, input, lengths=[33, 7, 20, 0, 33]))
    finally:
        torch.set_num_threads(before)
    for name in NAMES:
        assert torch.equal(found[0][name], found[1][name]) and torch.equal(found[0][name], found[2][name])


def test_any_strides(on_backend):
    """Tokens first, samples cut out of longer ones, features that are no neighbours or all one; operands of a graph."""
    grad_out, input = draw(4, 10, 15, 21)
    want = add(zeros(15, 21), grad_out, input)
    first = [t.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (grad_out, input)]
    long = [torch.full((4, 14, t.shape[-1] + 3), float("nan")) for t in (grad_out, input)]
    for t, inside in zip((grad_out, input), long, strict=True):
        inside[:, 2:12, 1:-2] = t
    cut = [t[:, 2:12, 1:-2] for t in long]
    spread = [torch.stack([t, t + 1], -1)[..., 0] for t in (grad_out, input)]
    for operands in (first, cut, spread):
        got = add(zeros(15, 21), *operands)
        assert all(torch.equal(got[name], want[name]) and not got[name].requires_grad for name in NAMES)
    ones = torch.ones(()).expand(4, 10, 15)  # the gradient of a sum
    for name, exact in specified(ones, input).items():
        assert_agrees(name, add(zeros(15, 21), ones, input)[name], exact)


def test_four_thousand_samples_in_bf16(on_backend):
    """Summing in the operands' bf16, as is published, stops where a sample is less than half a spacing: > 30 % low."""
    grad_out, input = draw(4096, 3, 10, 17, torch.bfloat16)
    states = add(zeros(10, 17), grad_out, input)
    exact = specified(grad_out, input)
    for name in ("score", "squared"):
        assert float(((states[name].double() - exact[name]) / exact[name]).abs().max()) < 1e-5
    assert_agrees("signed", states["signed"], exact["signed"], ulps=128)
    want = exact["score"]
    narrow = torch.zeros(10, 17, dtype=torch.bfloat16)
    for dy, x in zip(grad_out, input, strict=True):
        narrow += (dy.T @ x).abs()
    assert float(((narrow.double() - want) / want).max()) < -0.3


def test_what_is_not_finite_is_seen(on_backend):
    grad_out, input = draw(2, 5, 12, 20)
    grad_out[0, 2, 3], input[1, 4, 6] = float("nan"), float("inf")
    states = add(zeros(12, 20), grad_out, input)
    seen = torch.zeros(12, 20, dtype=torch.bool)
    seen[3], seen[:, 6] = True, True
    for name in NAMES:
        assert torch.equal(~torch.isfinite(states[name]), seen)
    assert states["score"][0, 6] == float("inf") and states["score"][3].isnan().all()


def test_nothing_to_add(on_backend):
    states = zeros(4, 6)
    nan = torch.full((2, 3, 4), float("nan")), torch.full((2, 3, 6), float("nan"))
    add(states, *nan, lengths=[0, 0])
    add(states, nan[0][:0], nan[1][:0])
    add(states, nan[0][:, :0], nan[1][:, :0])
    add(states, nan[0][0], nan[1][0], bounds=torch.zeros(0, 2, dtype=torch.long))
    add(states, nan[0][0, :0], nan[1][0, :0], offsets=[0, 0])
    assert not any(t.any() for t in states.values())
    add(zeros(0, 6), nan[0][..., :0], nan[1])
    add(zeros(4, 0), nan[0], nan[1][..., :0])


def test_opcheck_compile_and_autocast(on_backend):
    grad_out, input = draw(3, 4, 6, 10)
    op = torch.ops.fastguard.abs_weight_grad_
    if on_backend == "portable":
        for given in (NAMES, ("score",), ("squared", "signed")):
            states = [torch.zeros(6, 10) if name in given else None for name in NAMES]
            torch.library.opcheck(op, (*states, grad_out, input, segments.bounds_of(input)))

    def run(grad_out, input, score, signed, lengths):
        dy = grad_out.mul(2)
        abs_weight_grad_(score, dy, input, signed=signed, lengths=lengths)
        return score.sum() + dy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, theirs, lengths = torch.zeros(2, 6, 10), torch.zeros(2, 6, 10), torch.tensor([4, 1, 3])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(grad_out, input, *ours, lengths), run(grad_out, input, *theirs, lengths))
    assert torch.equal(ours, theirs) and ours[0].all()
    with pytest.raises((ValueError, RuntimeError), match="bounds: expected ascending rows within 0 to 12, got"):
        compiled(grad_out, input, *ours, torch.tensor([4, 1, 9]))
    version = ours._version
    run(grad_out, input, *ours, lengths)
    assert ours._version > version


BOTH = torch.zeros(7, 6)
S, D, X = torch.zeros(4, 6), torch.zeros(2, 3, 4), torch.zeros(2, 3, 6)
ERRORS = {
    "grad_out": ((S, D[0, 0], X), {}),
    "grad_out dtype": ((S, D.long(), X.long()), {}),
    "input": ((S, D, X[:1]), {}),
    "input dimensions": ((S, D, X[0]), {}),
    "input dtype": ((S, D, X.bfloat16()), {}),
    "input device": ((S, D, X.to("meta")), {}),
    "score": ((S.T, D, X), {}),
    "score missing": ((None, D, X), {}),
    "score dtype": ((S.bfloat16(), D.bfloat16(), X.bfloat16()), {}),
    "score narrow": ((S, D.double(), X.double()), {}),
    "score strides": ((S.T.contiguous().T, D, X), {}),
    "score device": ((S.to("meta"), D, X), {}),
    "squared": ((S, D, X), {"squared": S[:2]}),
    "squared memory": ((S, D, X), {"squared": S}),
    "squared wide": ((S, D, X), {"squared": S.double()}),
    "signed": ((None, D, X), {"signed": S.T}),
    "signed memory": ((BOTH[:4], D, X), {"signed": BOTH[3:]}),
    "lengths": ((S, D, X), {"lengths": [1, 2, 3]}),
    "lengths range": ((S, D, X), {"lengths": [1, 4]}),
    "offsets": ((S, D, X), {"offsets": [0, 6]}),
    "offsets end": ((S, D[0], X[0]), {"offsets": [0, 2]}),
    "bounds": ((S, D, X), {"bounds": torch.tensor([[0, 7]])}),
    "bounds descending": ((S, D[0], X[0]), {"bounds": torch.tensor([[2, 1]])}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        abs_weight_grad_(*arguments, **options)


def test_neighbours_in_memory_are_apart(on_backend):
    """The scores of a model may lie in one buffer."""
    grad_out, input = draw(2, 3, 4, 6)
    buffer = torch.zeros(3, 4, 6)
    add(dict(zip(NAMES, buffer, strict=True)), grad_out, input)
    want = add(zeros(4, 6), grad_out, input)
    assert all(torch.equal(part, want[name]) for name, part in zip(NAMES, buffer, strict=True))

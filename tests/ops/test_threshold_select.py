"""threshold_select against a stable sort of everything, on every backend this machine has."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from fastguard import backend
from fastguard.ops.masks import and_not, count_bits, unpack_mask
from fastguard.ops.threshold_select import keys, reference, threshold_select
from launch import two_processes
from ops.threshold_select_worker import CASES

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PER = ["model", "tensor", "row"]

# Shapes and why: no dimension; one; none; rows of none; rows that share bytes of the mask; three dimensions; a span
# and a bit; a long row
SHAPES = [(), (1,), (0,), (3, 0), (33, 5), (2, 3, 64), (700, 97), (1, 70001)]
INF = float("inf")


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def normal(shape, dtype):
    return torch.randn(shape).to(dtype)


def few(shape, dtype):
    """Nearly all are ties."""
    return torch.randint(-2, 3, shape).to(dtype)


def signs(shape, dtype):
    """0.0 and -0.0, which are equal, and little else."""
    return (torch.randint(-8, 9, shape) // 8 * torch.randint(-1, 2, shape).double()).to(dtype)


def denormal(shape, dtype):
    """Numbers below the smallest normal one, and some above."""
    return (torch.randn(shape, dtype=torch.float64) * torch.finfo(dtype).tiny).to(dtype)


def extreme(shape, dtype):
    """All exponents, both infinities."""
    info = torch.finfo(dtype)
    spread = torch.rand(shape, dtype=torch.float64) * (math.log(info.max) - math.log(info.tiny)) + math.log(info.tiny)
    x = (spread.exp() * torch.randn(shape, dtype=torch.float64).sign()).to(dtype)
    return torch.where(torch.rand(shape) < 0.05, torch.tensor(INF, dtype=dtype) * x.sign(), x)


def equal(shape, dtype):
    return torch.full(shape, -1.5, dtype=dtype)


KINDS = [normal, few, signs, denormal, extreme, equal]


def draw(kind, dtypes, shapes=SHAPES):
    dtype = itertools.cycle(dtypes)
    return [kind(shape, next(dtype)) for shape in shapes]


def wanted(scores, k, per):
    """k of each group of entries, as published."""
    sizes = {
        "model": [sum(s.numel() for s in scores)],
        "tensor": [s.numel() for s in scores],
        "row": [s.shape[-1] if s.dim() else 1 for s in scores],
    }[per]
    return [int(k * n) if isinstance(k, float) else min(k, n) for n in sizes]


def assert_selected(selected, scores, weights, k, per):
    masks, thresholds = reference.select(scores, weights, wanted(scores, k, per), per)
    for i, mask in enumerate(masks):
        assert selected.masks[i].dtype == torch.uint8 and selected.masks[i].shape == ((mask.numel() + 7) // 8,)
        assert torch.equal(selected.unpacked(i), mask), f"masks[{i}], k {k}"
        assert int(count_bits(selected.masks[i])) == int(mask.sum()), f"masks[{i}]: bits behind the last entry"
    assert selected.count == sum(int(m.sum()) for m in masks)
    found = selected.threshold if per == "row" else [selected.threshold]
    exact = thresholds if per == "row" else [torch.stack(thresholds).view(found[0].shape)]
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert torch.equal(a.double(), b), f"threshold {i}, k {k}"


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [*([d] for d in DTYPES), DTYPES, DTYPES[:3]], ids=str)
def test_scores(on_backend, dtypes, kind, per):
    scores = draw(kind, dtypes)
    for k in (0, 1, 50, 0.05, 0.5, 0.97, 10**9):
        selected = threshold_select(scores, k, per=per)
        assert_selected(selected, scores, None, k, per)
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        if per != "row":
            assert selected.threshold.dtype == wide


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("kind", [normal, few, denormal])
@pytest.mark.parametrize(
    "dtypes",
    [
        ([torch.float32], [torch.float32]),
        ([torch.float32], [torch.bfloat16]),
        ([torch.bfloat16], [torch.bfloat16]),
        (DTYPES, DTYPES[1:]),
        (DTYPES[:3], DTYPES[1:3]),
    ],
    ids=str,
)
def test_scores_of_weights(on_backend, dtypes, kind, per):
    """The number that is compared is the product as it is rounded."""
    scores, weights = draw(kind, dtypes[0]), draw(kind, dtypes[1])
    for k in (1, 0.05, 0.5, 10**9):
        assert_selected(threshold_select(scores, k, weights=weights, per=per), scores, weights, k, per)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 65, 1000, 65535, 65536, 65537, 200001])
def test_equals_kthvalue_and_topk(on_backend, n):
    for dtype, k in itertools.product(DTYPES, sorted({1, (n + 1) // 2, n})):
        x = normal((n,), dtype)
        selected = threshold_select(x, k)
        assert selected.threshold == x.kthvalue(n - k + 1).values
        assert int(count_bits(selected.masks)) == selected.count == k
        chosen = x[selected.unpacked()]
        assert torch.equal(chosen.sort().values, x.topk(k).values.sort().values)


def test_all_16_bit_numbers(on_backend):
    """Every k of every bfloat16 and float16 that is a number, against a sort; a spoiled mask is rejected."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15).short().view(dtype)
        x = x[~x.isnan()][torch.randperm(int((~x.isnan()).sum()))]
        for k in (1, 2, 31743, 31744, 31745, 32000, 60000, len(x) - 1):
            selected = threshold_select([x], k)
            assert_selected(selected, [x], None, k, "model")
            for wrong in (torch.zeros_like(selected.masks[0]), selected.masks[0].roll(1), ~selected.masks[0]):
                spoiled = type(selected)([wrong], selected.threshold, selected.count, selected.shapes)
                with pytest.raises(AssertionError):
                    assert_selected(spoiled, [x], None, k, "model")


def test_ties_are_chosen_from_the_first_on(on_backend):
    """Over tensors and spans, by hand: 3 of 2.0, then as many of 1.0 as are missing."""
    scores = [torch.ones(5), torch.zeros(70000), torch.ones(70000), torch.ones(3)]
    scores[1][[0, 65536, 69999]] = 2
    scores[2][:100] = -1
    selected = threshold_select(scores, 3 + 5 + 66000)
    assert selected.threshold == 1 and selected.count == 66008
    assert selected.unpacked(0).all() and not selected.unpacked(3).any()
    assert selected.unpacked(1).nonzero().flatten().tolist() == [0, 65536, 69999]
    assert selected.unpacked(2).nonzero().flatten().tolist() == list(range(100, 66100))
    rows = threshold_select(torch.tensor([[1.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, 0.0]]), 2, per="row")
    assert rows.unpacked().tolist() == [[True, True, False, False], [True, True, False, False]]


def test_containers(on_backend):
    x = {"b": torch.randn(3, 7), "a": torch.randn(12)}
    one = threshold_select(x["b"], 5)
    assert one.masks.shape == (3,) and one.unpacked().shape == (3, 7) and one.threshold.shape == ()
    named = threshold_select(x, 5, weights={"a": torch.randn(12), "b": torch.randn(3, 7)}, per="row")
    assert list(named.masks) == list(named.threshold) == list(named.shapes) == ["b", "a"] and named.count == 20
    assert named.threshold["b"].shape == (3,) and named.threshold["a"].shape == (1,)
    assert named.unpacked("b").sum(1).tolist() == [5, 5, 5]
    listed = threshold_select(tuple(x.values()), 5, per="tensor")
    assert isinstance(listed.masks, list) and listed.threshold.shape == (2,) and listed.count == 10
    with pytest.raises(KeyError, match="there is one mask"):
        one.unpacked("b")


def test_strides_and_gradients(on_backend):
    x, w = torch.randn(40, 30, requires_grad=True), torch.nn.Parameter(torch.randn(40, 60)[:, ::2])
    for a, b in ((x.t(), w.t()), (x[3:, 1:], w[3:, 1:]), (x[:1].expand(5, 30), w[:5])):
        for per in PER:
            selected = threshold_select([a], 0.3, weights=[b], per=per)
            assert_selected(selected, [a.detach()], [b.detach()], 0.3, per)
    assert not selected.threshold[0].requires_grad


def test_more_than_a_piece(on_backend):
    """More entries than any backend takes at a time, in one row and in many."""
    x = torch.randn(1, 4_300_003).mul_(8).round_()
    assert_selected(threshold_select([x], 0.3), [x], None, 0.3, "model")
    assert_selected(threshold_select([x], 0.3, per="row"), [x], None, 0.3, "row")
    x = x[:, :270_000].view(-1, 9)
    key = threshold_select(x, 3, per="row")
    order = x.sort(dim=1, descending=True, stable=True).indices[:, :3]
    assert torch.equal(key.unpacked(), torch.zeros_like(x, dtype=torch.bool).scatter_(1, order, True))


def test_set_difference_of_two_thresholds(on_backend):
    """Top q of a safety score without top p of a utility score, per matrix (Wei et al.)."""
    safety, utility = torch.rand(2, 60, 50)
    chosen, kept = (threshold_select(s, q, per="tensor") for s, q in ((safety, 0.1), (utility, 0.2)))
    assert (chosen.count, kept.count) == (300, 600)
    difference = unpack_mask(and_not(chosen.masks, kept.masks), (60, 50))
    top = [torch.isin(torch.arange(3000), s.flatten().topk(n).indices) for s, n in ((safety, 300), (utility, 600))]
    assert torch.equal(difference.flatten(), top[0] & ~top[1])


def test_nan_is_refused_by_name(on_backend):
    quiet, signalling = 0x7FC00000, 0x7F800001
    for per, bits, where, k in itertools.product(PER, (quiet, signalling, -1), (0, 70000), (0, 5, 10**9)):
        bad = torch.zeros(70001)
        bad.view(torch.int32)[where] = bits
        good = torch.tensor([1.0, INF, -INF])
        with pytest.raises(ValueError, match=r"^scores\['bad'\]: expected numbers that can be ordered, got NaN"):
            threshold_select({"good": good, "bad": bad}, k, per=per)
        with pytest.raises(ValueError, match=r"^scores\[1\]: expected \|weights\| \* scores that can be ordered"):
            threshold_select([good, torch.ones(70001)], k, weights=[good, bad], per=per)
        with pytest.raises(ValueError, match=r"^scores: expected \|weights\|"):
            threshold_select(torch.tensor([1.0, INF]), k, weights=torch.tensor([1.0, 0.0]), per=per)
    for dtype in DTYPES:
        x = torch.zeros(20, dtype=dtype)
        x[13] = float("nan")
        with pytest.raises(ValueError, match=r"scores: .* got NaN"):
            threshold_select(x, 3)


def test_what_does_not_fit_is_refused_by_name():
    x = torch.randn(3, 5)
    for call, match in (
        (lambda: threshold_select(x, -1), "k: expected 0 or more, got -1"),
        (lambda: threshold_select(x, 1.5), "k: expected a fraction from 0 to 1, or an int, got 1.5"),
        (lambda: threshold_select(x, float("nan")), "k: expected a fraction"),
        (lambda: threshold_select(x, True), "k: expected an int or a float, got True"),
        (lambda: threshold_select(x, 1, per="column"), "per: expected one of model, row, tensor, got 'column'"),
        (lambda: threshold_select([], 1), "scores: expected at least one tensor"),
        (lambda: threshold_select([x, x.int()], 1), r"scores\[1\]: expected a dtype of"),
        (lambda: threshold_select([x, 3.0], 1), r"scores\[1\]: expected a tensor, got float"),
        (lambda: threshold_select([x, x.to("meta")], 1), r"scores\[1\]: expected device cpu, got meta"),
        (lambda: threshold_select([x], 1, weights=[x[0]]), r"weights\[0\]: expected shape \(3, 5\), got \(5,\)"),
        (lambda: threshold_select([x, x], 1, weights=[x]), r"weights: .*differing in weights\[1\]"),
        (lambda: threshold_select({"a": x}, 1, weights={"b": x}), r"differing in weights\['a'\], weights\['b'\]"),
        (lambda: threshold_select(x, 1, weights={"a": x}), "weights: expected a tensor for each"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_inputs_stay_and_threads_do_not_matter(on_backend):
    x = draw(few, DTYPES)
    before, threads = [t.clone() for t in x], torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([threshold_select(x, 0.4, per=per) for per in PER])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(m, n) for m, n in zip(a.masks, b.masks, strict=True))


def test_keys_are_in_order():
    for dtype in DTYPES:
        x = extreme((4000,), dtype).double().sort().values.to(dtype)
        key = keys.encode(x)
        assert torch.equal(key[1:] > key[:-1], x[1:] > x[:-1])
        assert torch.equal(keys.decode(key.long(), dtype), x.to(keys.wide_of(x)))
    zeros = torch.tensor([0.0, -0.0])
    assert keys.encode(zeros).tolist() == [0, 0]


def test_opcheck(on_backend):
    x, w = draw(normal, DTYPES, SHAPES[3:6]), draw(normal, DTYPES[2:], SHAPES[3:6])
    for per, k in (("model", [7]), ("tensor", [0, 7, 7]), ("row", [0, 2, 2])):
        for weights in ([], w):
            torch.library.opcheck(torch.ops.fastguard.threshold_select, (x, weights, k, per, "a\nb\nc"))


def test_compiles_to_one_graph(on_backend):
    def run(x, w):
        one = threshold_select({"x": x, "w": w.abs()}, 0.25, weights={"x": w, "w": w})
        rows = threshold_select(x * 2, 3, per="row")
        return one.masks["x"], one.threshold, rows.masks, rows.threshold, rows.unpacked() & one.unpacked("x")

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for n in (9, 12):
        x, w = torch.randn(2, n, 13)
        for a, b in zip(compiled(x, w), run(x, w), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    two_processes(Path(__file__).with_name("threshold_select_worker.py"), tmp_path, passes=CASES)

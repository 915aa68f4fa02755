"""Logits that ``lm_head_stats`` keeps for its backward: the same numbers, up to a budget, and nowhere unasked."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tiny_models
from checks import assert_agrees, assert_catches_spoiled
from fastguard import LanguageModelLoss, RepNoiseLoss, backend
from fastguard.ops.lens_stats import lens_stats
from fastguard.ops.linear_cross_entropy import linear_cross_entropy
from fastguard.ops.lm_head_stats import lm_head_stats, reference

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
N, V, D = 230, 4500, 8
"""Two blocks of the vocabulary in the backward."""

SOME = 150
"""Rows that a budget lets a call keep: more than a tile."""


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


@pytest.fixture
def kept(monkeypatch):
    """Rows of each call's logits that were kept."""
    rows = []
    impl = backend.choose("lm_head_stats", torch.device("cpu"))
    keep = impl.keep
    monkeypatch.setattr(impl, "keep", lambda x, *a, **k: rows.append(len(x)) or keep(x, *a, **k))
    return rows


def draw(dtype=torch.float64, n=N):
    hidden, weight, bias = torch.randn(n, D).to(dtype), 0.5 * torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)
    target = torch.randint(0, V, (n,))
    target[::9] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("rows", [0, SOME, N])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_statistics_and_gradients_are_the_same_however_many_are_kept(on_backend, kept, dtype, rows):
    hidden, weight, bias, target = draw(dtype)
    upstream = torch.rand(4, N, dtype=torch.float64) + 0.5
    options = dict(scale=1.3, softcap=15.0)

    def run(fn, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        stats = torch.stack(list(fn(*leaves)))
        twice = [torch.autograd.grad(stats, leaves, upstream.to(stats.dtype), retain_graph=True) for _ in range(2)]
        assert all(a.equal(b) for a, b in zip(*twice, strict=True)), "the first backward wrote to what was kept"
        return [stats.detach(), *twice[0]]

    def ours(h, w, b):
        budget = rows * V * dtype.itemsize
        return lm_head_stats(h, w, target, bias=b, filter_tol=0.0, with_mean=True, keep_logits_bytes=budget, **options)

    def spec(h, w, b):
        return reference.lm_head_stats(h, w, target, b, **options)

    found, exact, peer = run(ours, dtype), run(spec, torch.float64), run(spec, dtype)
    assert kept == ([min(rows, int((target >= 0).sum()))] if rows else [])
    for name, mine, want, same in zip(("statistics", "hidden", "weight", "bias"), found, exact, peer, strict=True):
        assert_agrees(name, mine, want, same, ulps=64)
        assert_catches_spoiled(lambda x, w=want, s=same: assert_agrees("", x, w, s, ulps=64), mine)


def test_an_exact_gradient_of_the_head_is_made_in_its_own_dtype(monkeypatch):
    """Also where nothing is kept: no block of it is added to, so none has to be wide."""
    made = []
    impl = backend.choose("lm_head_stats", torch.device("cpu"))
    read = impl.read_kept
    monkeypatch.setattr(impl, "read_kept", lambda *a, **k: made.append(a[7].dtype) or read(*a, **k))
    hidden, weight, _, target = draw(torch.bfloat16)
    stats = lm_head_stats(hidden, weight.requires_grad_(), target, filter_tol=0.0, keep_logits_bytes=0)
    stats.lse.sum().backward()
    assert made == [torch.bfloat16]


def test_kept_rows_are_exact_and_the_filter_is_for_the_others(on_backend):
    hidden, weight, _, target = draw()
    weight[:90] *= 6  # peaked: the filter has something to leave out

    def dx(**options):
        leaf = hidden.clone().requires_grad_()
        return torch.autograd.grad(lm_head_stats(leaf, weight, target, **options).lse.sum(), leaf)[0]

    counted = target >= 0
    exact = dx(filter_tol=0.0)[counted]
    found = dx(filter_tol=0.1, keep_logits_bytes=SOME * V * 8)[counted]
    far = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert far[:SOME].max() < 1e-12 < 1e-6 < far[SOME:].max()


def test_logits_are_kept_by_default_where_the_head_is_exact_and_needs_a_gradient(kept):
    hidden, weight, _, target = draw(torch.float32, n=20)
    rows = int((target >= 0).sum())
    lm_head_stats(hidden, weight, target, filter_tol=0.0)
    weight.requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, target)
    lm_head_stats(hidden, weight, target)
    linear_cross_entropy(hidden, weight, target, filter_tol=0.05)
    linear_cross_entropy(hidden, weight, target, keep_logits_bytes=0)
    assert kept == []
    lm_head_stats(hidden, weight, target, filter_tol=0.0)
    linear_cross_entropy(hidden, weight, target)
    linear_cross_entropy(hidden, weight, target, filter_tol=0.05, keep_logits_bytes=10 * V * 4)
    assert kept == [rows, rows, 10]


def test_losses_keep_those_of_the_output_alone(kept):
    """Of inner states there are too many."""
    model = tiny_models.tiny()
    harmful, harmless = tiny_models.pair()
    exact = RepNoiseLoss(model, filter_tol=0.0)
    exact(harmful=harmful, harmless=harmless)
    outputs = len(kept)
    assert 1 <= outputs <= 2  # of harmful and harmless, if not of both at once
    exact.close()
    for budget in (None, 0):
        loss = LanguageModelLoss(model, keep_logits_bytes=budget)
        loss(harmful)
        loss.close()
    assert len(kept) == outputs + 1
    with pytest.raises(ValueError, match=r"^keep_logits_bytes: expected an int >= 0 or None, got -1"):
        LanguageModelLoss(model, keep_logits_bytes=-1)


def test_compiles_once_for_any_number_of_rows():
    counter, counts = CompileCounterWithBackend("aot_eager"), set()
    weight = torch.randn(40, D)

    def loss(hidden, target):
        return linear_cross_entropy(hidden, weight, target, keep_logits_bytes=SOME * 40 * 4)

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for n in (20, SOME, 200):
        leaf, target = torch.randn(n, D, requires_grad=True), torch.randint(0, 40, (n,))
        found, want = (torch.autograd.grad(f(leaf, target), leaf)[0] for f in (compiled, loss))
        assert_agrees("compiled", found, want)
        counts.add(counter.frame_count)
    assert len(counts) == 1, counts


@pytest.mark.parametrize("rows", [0, SOME, N])
def test_the_head_s_first_gradient_is_written_before_anything_is_added(on_backend, rows):
    """New memory holds NaN in deterministic mode."""
    hidden, weight, _, target = draw()
    states = [hidden, 2 * hidden]

    def gradient(budget, chained):
        w = weight.clone().requires_grad_()
        token, total = (torch.zeros((), dtype=w.dtype).expand(V, D).requires_grad_() if chained else None), 0.0
        first = token
        for state in states:
            stats, token = lens_stats(
                state, torch.arange(N), w.detach() if chained else w, target, norm_kind="none", filter_tol=0.0,
                keep_logits_bytes=budget, token=token,
            )  # fmt: skip
            total = total + stats.lse.sum()
        return torch.autograd.grad(total, first if chained else w)[0]

    exact = gradient(0, False)
    torch.use_deterministic_algorithms(True)
    try:
        for chained in (True, False):
            torch.testing.assert_close(gradient(rows * V * 8, chained), exact)
    finally:
        torch.use_deterministic_algorithms(False)

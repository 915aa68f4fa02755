"""linear_cross_entropy against torch's cross-entropy on explicit logits."""

import itertools

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.linear_cross_entropy import linear_cross_entropy, reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_reference(reduction, dtype):
    hidden = torch.randn(3, 47, 16, dtype=torch.float64).to(dtype)
    weight = torch.randn(503, 16, dtype=torch.float64).to(dtype)
    target = torch.randint(0, 503, (3, 47))
    target[0, 5:9] = -100

    def run(fn, cast, **options):
        h, w = (cast(t).clone().requires_grad_() for t in (hidden, weight))
        loss = fn(h, w, target, scale=0.8, softcap=20.0, reduction=reduction, **options)
        upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape)
        return loss.detach(), *torch.autograd.grad(loss, (h, w), upstream.to(loss.dtype))

    ours = run(linear_cross_entropy, lambda t: t, filter_tol=0.0)
    exact = run(reference.linear_cross_entropy, torch.Tensor.double)
    peer = run(reference.linear_cross_entropy, lambda t: t)
    for name, mine, want, same in zip(("loss", "hidden", "weight"), ours, exact, peer, strict=True):
        assert_agrees(name, mine, want, same)
        if name != "loss":
            flat = [t.reshape(-1, 16) for t in (mine, want, same)]
            assert_catches_spoiled(lambda x, f=flat: assert_agrees("gradient", x, f[1], f[2]), flat[0])


OPTIONS = [
    pytest.param(dict(label_smoothing=eps, z_loss=z, reduction=reduction), weighted, bias,
                 id=f"smoothing {eps}, z {z}, {reduction}" + ", weights" * weighted + ", bias" * bias)
    for eps, z, reduction, weighted, bias in itertools.product(
        (0.0, 0.1, 1.0), (0.0, 1e-2), ("mean", "sum", "none"), (False, True), (False, True)
    )
]  # fmt: skip


def evaluate(fn, leaves, target, **options):
    """Loss and gradients of hidden, weight and (if there is one) bias, another upstream gradient for each loss."""
    h, w, b = (None if t is None else t.detach().clone().requires_grad_() for t in leaves)
    loss = fn(h, w, target, bias=b, **options)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, [t for t in (h, w, b) if t is not None], upstream.to(loss.dtype))


@pytest.mark.parametrize("options, weighted, bias", OPTIONS)
def test_smoothing_class_weights_and_z_loss(options, weighted, bias):
    """Every combination, in float64, against torch's cross-entropy of the logits; what is ignored may be anything."""
    hidden = torch.randn(3, 11, 6, dtype=torch.float64)
    weight, b = torch.randn(29, 6, dtype=torch.float64), torch.randn(29, dtype=torch.float64)
    target = torch.randint(0, 29, (3, 11))
    target[0, 4:6] = target[2, 0] = -100
    options = dict(options, scale=0.7, class_weight=torch.rand(29, dtype=torch.float64) if weighted else None)
    leaves = (hidden, weight, b if bias else None)
    exact = evaluate(reference.linear_cross_entropy, leaves, target, **options)
    spoilt = hidden.masked_fill((target < 0)[..., None], float("inf"))
    ours = evaluate(linear_cross_entropy, (spoilt, *leaves[1:]), target, filter_tol=0.0, **options)
    for name, mine, want in zip(("loss", "hidden", "weight", "bias"), ours, exact, strict=False):
        assert_agrees(name, mine, want, ulps=512)
        if name in ("hidden", "weight"):
            flat = mine.reshape(-1, 6), want.reshape(-1, 6)
            assert_catches_spoiled(lambda x, w=flat[1]: assert_agrees("gradient", x, w, ulps=512), flat[0])
    if not options["z_loss"]:
        logits = (hidden @ weight.T + (b if bias else 0)) * 0.7
        torch_says = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), weight=options["class_weight"],
            label_smoothing=options["label_smoothing"], reduction=options["reduction"],
        )  # fmt: skip
        assert_agrees("loss", ours[0].flatten(), torch_says.flatten(), ulps=512)


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weights"])
def test_smoothing_in_half_precision(weighted, monkeypatch):
    """The mean logit comes from a head that is neither widened whole nor summed in its own dtype."""
    monkeypatch.setattr("fastguard.ops.linear_cross_entropy.op.CLASSES", 100)
    leaves = [torch.randn(*shape).bfloat16() for shape in ((40, 16), (503, 16), (503,))]
    target = torch.randint(0, 503, (40,))
    target[3] = -100
    options = dict(label_smoothing=0.2, class_weight=torch.rand(503) if weighted else None, reduction="none")
    ours = evaluate(linear_cross_entropy, leaves, target, **options)
    exact = evaluate(reference.linear_cross_entropy, [t.double() for t in leaves], target, **options)
    peer = evaluate(reference.linear_cross_entropy, leaves, target, **options)
    for name, mine, want, same in zip(("loss", "hidden", "weight", "bias"), ours, exact, peer, strict=True):
        assert_agrees(name, mine, want, same)


@pytest.mark.parametrize("options", [
    {"z_loss": 1e-3}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "z_loss": 1e-3, "class_weight": True},
], ids=str)  # fmt: skip
def test_the_filter_keeps_its_bound(options):
    """One row, so that the bias' gradient is the logits': what the filter moves is at most twice what it may drop.

    And it is the same part of the softmax's gradient under all options.
    """
    tol, v = 0.1, 3000
    hidden, weight, bias = torch.randn(1, 32), 0.7 * torch.randn(v, 32), torch.randn(v)
    target = torch.tensor([7])
    if "class_weight" in options:
        options = dict(options, class_weight=torch.rand(v) + 0.5)
    z = (hidden.double() @ weight.double().T + bias.double())[0]
    p, lse = z.softmax(0), z.logsumexp(0)
    of_row, total = 1.0, 1.0
    if "class_weight" in options:
        of_row, total = float(options["class_weight"][7]), float(options["class_weight"].sum()) / v
    eps, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    factor = (1 - eps) * of_row + eps * total + 2 * z_loss * float(lse)

    def gradients(filter_tol, **options):
        return evaluate(linear_cross_entropy, (hidden, weight, bias), target, filter_tol=filter_tol, **options)

    def moved_by(**options):
        return float((gradients(tol, **options)[3] - gradients(0.0, **options)[3]).abs().sum())

    moved, plain = moved_by(reduction="sum", **options), moved_by()
    assert 1e-2 < moved <= 2 * tol * float(1 - p[7]) * factor * (1 + 1e-4)
    assert moved == pytest.approx(plain * factor, rel=1e-3)
    if eps:  # None means exact there
        both = gradients(None, **options), gradients(0.0, **options)
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_smoothing_leaves_the_filters_error_as_it_is():
    """The labels' part of the gradient is exact: filtered minus exact is the same with and without it."""
    hidden, weight = torch.randn(150, 32, dtype=torch.float64), torch.randn(2000, 32, dtype=torch.float64)
    weight[:40] *= 6.0
    target = torch.randint(0, 2000, (150,))

    def moved(eps):
        both = [
            evaluate(linear_cross_entropy, (hidden, weight, None), target, filter_tol=tol, label_smoothing=eps)
            for tol in (0.1, 0.0)
        ]
        return [f - e for f, e in zip(*both, strict=True)][1:]

    for smooth, plain in zip(moved(0.3), moved(0.0), strict=True):
        assert plain.norm() > 1e-6
        torch.testing.assert_close(smooth, plain, rtol=1e-8, atol=1e-14)


def test_targets_that_weigh_nothing_are_nan_as_in_torch():
    hidden, weight, target = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([3, 3, -100, 3])
    none = torch.ones(11).index_fill_(0, torch.tensor([3]), 0.0)
    assert linear_cross_entropy(hidden, weight, target, class_weight=none).isnan()
    assert linear_cross_entropy(hidden, weight, torch.full((4,), -100), class_weight=none, label_smoothing=0.1) == 0


def test_compiles_without_breaks():
    leaves = torch.randn(2, 9, 8), torch.randn(31, 8), torch.randn(31)
    target = torch.randint(0, 31, (2, 9))
    target[1, 3] = -100
    options = dict(class_weight=torch.rand(31), label_smoothing=0.1, z_loss=1e-3)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for a, b in zip(evaluate(compiled, leaves, target, **options),
                    evaluate(linear_cross_entropy, leaves, target, **options), strict=True):  # fmt: skip
        assert_agrees("compiled", a, b)


def test_all_rows_masked_is_zero_not_nan():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_custom_ignore_index():
    hidden, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 2, 3, 0])
    ours = linear_cross_entropy(hidden, weight, target, ignore_index=0)
    assert_agrees("loss", ours, reference.linear_cross_entropy(hidden, weight, target, ignore_index=0))


def test_errors():
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        linear_cross_entropy(hidden, weight, torch.zeros(6, dtype=torch.int64), reduction="max")
    with pytest.raises(ValueError, match=r"target: expected shape \(6,\)"):
        linear_cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("options", [
    {"label_smoothing": 1.1}, {"label_smoothing": -0.1}, {"label_smoothing": 0.1, "softcap": 30.0},
    {"class_weight": torch.ones(10)}, {"class_weight": torch.ones(11, dtype=torch.int64)},
    {"class_weight": torch.ones(11, requires_grad=True)}, {"class_weight": torch.ones(11, device="meta")},
], ids=str)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: expected"):
        linear_cross_entropy(torch.randn(6, 8), torch.randn(11, 8), torch.zeros(6, dtype=torch.int64), **options)

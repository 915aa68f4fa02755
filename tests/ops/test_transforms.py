"""What torch does to an op besides calling it: each derivative is right, or an error says which there is not."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.gaussian_mmd import gaussian_mmd
from fastguard.ops.gaussian_mmd import reference as mmd_reference
from fastguard.ops.lens_stats import lens_stats
from fastguard.ops.linear_cross_entropy import linear_cross_entropy
from fastguard.ops.lm_head_stats import lm_head_stats
from fastguard.ops.philox import gaussian_noise
from fastguard.ops.representation_distance import reference as distance_reference
from fastguard.ops.representation_distance import representation_distance

N, V, D = 6, 23, 8
TARGET = torch.tensor([3, 22, -100, 0, 7, 7])
WEIGHT = torch.randn(V, D, generator=torch.Generator().manual_seed(5)).double()


def plain_ce(h, w=WEIGHT):
    return nn.functional.cross_entropy(h @ w.T, TARGET, reduction="none")


# op -> the op and the same in plain torch, functions of [N, D]
OPS = {
    "lm_head_stats": (lambda h: lm_head_stats(h, WEIGHT, TARGET, filter_tol=0.0).cross_entropy(), plain_ce),
    "lens_stats": (
        lambda h: lens_stats(h, torch.arange(N), WEIGHT, TARGET, norm_kind="none", filter_tol=0.0)[0].cross_entropy(),
        plain_ce,
    ),
    "linear_cross_entropy": (
        lambda h: linear_cross_entropy(h, WEIGHT, TARGET, filter_tol=0.0, label_smoothing=0.1, reduction="none"),
        lambda h: nn.functional.cross_entropy(h @ WEIGHT.T, TARGET, reduction="none", label_smoothing=0.1),
    ),
    "gaussian_mmd": (
        lambda h: gaussian_mmd(h[None], call=2, seed=1),
        lambda h: mmd_reference.gaussian_mmd(
            h[None], gaussian_noise(N, D, seed=1, call=torch.tensor(2), dtype=torch.float64)[None]
        ),
    ),
    "representation_distance": (
        lambda h: representation_distance(h[None], WEIGHT[None, :N], kind="cosine"),
        lambda h: distance_reference.representation_distance(h[None], WEIGHT[None, :N], kind="cosine"),
    ),
}
NAMED = {"lens_stats": "lm_head_stats", "linear_cross_entropy": "lm_head_stats"}


@pytest.fixture(params=OPS)
def op(request):
    return NAMED.get(request.param, request.param), *OPS[request.param]


@pytest.fixture
def hidden():
    return torch.randn(N, D, dtype=torch.float64)


def test_func_grad_and_vjp(op, hidden):
    _, ours, plain = op
    want = torch.func.grad(lambda h: plain(h).square().sum())(hidden)
    found = torch.func.grad(lambda h: ours(h).square().sum())(hidden)
    assert_agrees("grad", found, want, ulps=512)
    assert_catches_spoiled(lambda x: assert_agrees("grad", x, want, ulps=512), found)
    value, pull = torch.func.vjp(ours, hidden)
    assert_agrees("value", value, plain(hidden), ulps=512)
    upstream = torch.randn_like(value)
    assert_agrees("vjp", pull(upstream)[0], torch.func.vjp(plain, hidden)[1](upstream)[0], ulps=512)


def test_vmap(op, hidden):
    _, ours, plain = op
    stack = torch.stack([hidden, 2 * hidden, hidden.sin()], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own fallback warns
        values = torch.vmap(ours, in_dims=1)(stack)
        grads = torch.vmap(torch.func.grad(lambda h: ours(h).sum()), in_dims=1)(stack)
        rows = torch.func.jacrev(ours)(hidden)
    for i in range(3):
        assert_agrees("value", values[i], plain(stack[:, i]), ulps=512)
        assert_agrees("gradient", grads[i], torch.func.grad(lambda h: plain(h).sum())(stack[:, i]), ulps=512)
    assert_agrees("jacobian", rows, torch.func.jacrev(plain)(hidden), ulps=512)


def test_vmap_over_the_head(hidden):
    """Several heads, one hidden state; per-sample gradients of both."""
    heads = torch.stack([WEIGHT, WEIGHT.cos()])

    def ours(h, w):
        return lm_head_stats(h, w, TARGET, filter_tol=0.0).cross_entropy("sum")

    found = torch.vmap(torch.func.grad(ours, argnums=(0, 1)), in_dims=(None, 0))(hidden, heads)
    want = torch.vmap(torch.func.grad(lambda h, w: plain_ce(h, w).sum(), argnums=(0, 1)), (None, 0))(hidden, heads)
    for a, b in zip(found, want, strict=True):
        assert_agrees("gradient", a, b, ulps=512)


def test_tangents_are_refused_not_zero(op, hidden):
    name, ours, _ = op
    match = f"^{name}: has no forward-mode derivative"
    with pytest.raises(RuntimeError, match=match):
        torch.func.jvp(ours, (hidden,), (hidden,))
    with pytest.raises(RuntimeError, match=match):
        torch.func.jacfwd(ours)(hidden)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=match):
        ours(forward_ad.make_dual(hidden, hidden))
    with forward_ad.dual_level():  # a level without a tangent is none of the op's business
        assert torch.equal(ours(hidden), ours(hidden.clone()))


def test_a_tangent_that_only_the_head_has(hidden):
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"^lm_head_stats: has no forward-mode"):
        linear_cross_entropy(hidden, forward_ad.make_dual(WEIGHT, WEIGHT), TARGET)


def test_second_derivatives_are_refused(op, hidden):
    name, ours, _ = op
    leaf = hidden.requires_grad_()
    (once,) = torch.autograd.grad(ours(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"^{name}: has no second derivative"):
        torch.autograd.grad(once.sum(), leaf)
    with pytest.raises(RuntimeError, match=f"^{name}: has no"):
        torch.func.grad(lambda h: torch.func.grad(lambda x: ours(x).sum())(h).sum())(hidden.detach())


def test_a_token_is_refused_where_it_would_lose_a_derivative(hidden):
    token = torch.zeros((), dtype=torch.float64).expand(V, D).requires_grad_()

    def loss(h):
        stats, _ = lens_stats(h, torch.arange(N), WEIGHT, TARGET, norm_kind="none", token=token)
        return stats.cross_entropy("mean")

    with pytest.raises(RuntimeError, match=r"^token: has no second derivative"):
        torch.autograd.grad(loss(hidden.requires_grad_()), token, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^token: has no meaning under torch.func"):
        torch.func.grad(loss)(hidden.detach())


def test_compiled_transforms(hidden):
    """Around torch.func, dynamo leaves the op to eager: right as well, or an error."""
    ours = OPS["representation_distance"][0]

    def slope(h):
        return torch.func.grad(lambda x: ours(x).sum())(h)

    assert_agrees("grad", torch.compile(slope, backend="aot_eager")(hidden), slope(hidden))
    with pytest.raises(Exception):  # the op's error, or dynamo's own about the level that it left behind
        torch.compile(lambda h: torch.func.jvp(ours, (h,), (h,))[1], backend="aot_eager")(hidden)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.float())

    def forward(self, hidden, target):
        kept = 200 * V * 4  # some rows of the longest example, all of the others
        return linear_cross_entropy(
            hidden, self.weight, target, label_smoothing=0.1, filter_tol=0.05, keep_logits_bytes=kept
        )


def test_export_is_not_bound_to_a_number_of_rows():
    model, n = Head(), torch.export.Dim("n", min=2, max=4096)
    example = torch.randn(40, D), torch.randint(0, V, (40,))
    program = torch.export.export(model, example, dynamic_shapes=({0: n}, {0: n})).module()
    for rows in (2, 128, 129, 700):
        args = torch.randn(rows, D), torch.randint(0, V, (rows,))
        assert program(*args).equal(model(*args))


# --- autocast -------------------------------------------------------------------------------------------------

MIXED = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


def lens_of(norm_kind):
    def run(h, w):
        options = dict(norm_kind=norm_kind, norm_eps=1e-5, bias=BIAS, filter_tol=0.0, with_mean=True)
        return lens_stats(h, torch.arange(N), w, TARGET, **options)[0]

    return run


BIAS = torch.linspace(-1, 1, V)
HEADS = {
    "lm_head_stats": lambda h, w: lm_head_stats(h, w, TARGET, bias=BIAS, filter_tol=0.0, with_mean=True),
    "lens_stats": lens_of("none"),
    "lens_stats, normed": lens_of("layer"),
    "linear_cross_entropy": lambda h, w: (
        linear_cross_entropy(h, w, TARGET, bias=BIAS, label_smoothing=0.1, filter_tol=0.0, reduction="none"),
    ),
}


CASES = [(name, dtypes, False) for name in HEADS for dtypes in MIXED]
CASES += [(name, MIXED[1], True) for name in ("lens_stats, normed", "linear_cross_entropy")]


@pytest.mark.parametrize("name, dtypes, compiled", CASES)
def test_autocast_casts_for_the_products(name, dtypes, compiled):
    """Under autocast an op is the op of cast inputs, bit for bit, wherever its backward runs; gradients keep dtypes."""
    h, w = torch.randn(N, D).to(dtypes[0]), torch.randn(V, D).to(dtypes[1])
    op = HEADS[name]
    cast = nn.functional.layer_norm(h.float(), (D,), eps=1e-5).to(h.dtype) if "normed" in name else h
    plain = HEADS["lens_stats"] if "normed" in name else op
    want_values = plain(cast.bfloat16(), w.bfloat16())
    torch._dynamo.reset()
    run = torch.compile(op, backend="aot_eager", fullgraph=True) if compiled else op

    def evaluate(inside):
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            values = run(*leaves)
            total = sum(v.sum() for v in values if v is not None)
            if inside:
                return values, torch.autograd.grad(total, leaves)
        return values, torch.autograd.grad(total, leaves)

    values, grads = evaluate(inside=False)
    for mine, want in zip(values, want_values, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, want)
    if "normed" not in name:
        leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
        outputs = op(leaves[0].bfloat16(), leaves[1].bfloat16())
        want_grads = torch.autograd.grad(sum(v.sum() for v in outputs if v is not None), leaves)
        assert grads[1].dtype == dtypes[1] and grads[1].equal(want_grads[1])
        # One rounding fewer where the hidden state is wider than the products: its gradient is never narrowed.
        assert_agrees("hidden", grads[0], want_grads[0].to(dtypes[0]), ratio=2.0**-7, ulps=2.0**-6 / 2.0**-23)
    if not compiled:
        assert all(a.equal(b) for a, b in zip(grads, evaluate(inside=True)[1], strict=True))


def test_autocast_casts_as_torchs_linear_does():
    h, w = torch.randn(N, D), torch.randn(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(h, w, TARGET)
        torchs = nn.functional.cross_entropy(nn.functional.linear(h, w), TARGET)
    assert ours.dtype == torch.float32
    exact = nn.functional.cross_entropy(h.bfloat16().double() @ w.bfloat16().double().T, TARGET)
    unrounded = nn.functional.cross_entropy(h.double() @ w.double().T, TARGET)
    assert abs(ours - exact) <= 3 * abs(torchs - exact) + 1e-3 < abs(unrounded - exact) + 5e-3
    # float64 stays out of autocast, as with torch's products
    with torch.autocast("cpu", torch.bfloat16):
        wide = linear_cross_entropy(h.double(), w.double(), TARGET)
    assert wide.dtype == torch.float64
    assert_agrees("float64", wide, unrounded)


@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_ops_without_a_head_take_no_notice_of_autocast(backend, monkeypatch):
    """They reduce in fp32 whatever comes in, as torch's own distances do under autocast; so do their backwards."""
    from fastguard.backend import unavailable

    if unavailable(backend, "cpu"):
        pytest.skip("no C++ extension")
    monkeypatch.setenv("FASTGUARD_BACKEND", backend)
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    for fn in (lambda v: gaussian_mmd(v, call=1), lambda v: representation_distance(v, y, kind="cosine")):
        leaf = x.clone().requires_grad_()
        want = fn(leaf)
        with torch.autocast("cpu", torch.bfloat16):
            found = fn(leaf)
            (inside,) = torch.autograd.grad(found.sum(), leaf)
        assert found.equal(want) and inside.equal(torch.autograd.grad(want.sum(), leaf)[0])


def test_dtypes_that_differ_without_autocast_name_both():
    match = r"^weight: expected the dtype of hidden \(torch.bfloat16\), got torch.float32; cast one of them, or call"
    for name, op in HEADS.items():
        with pytest.raises(ValueError, match=match):
            op(torch.randn(N, D).bfloat16(), torch.randn(V, D))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^weight: expected the dtype of"):
            op(torch.randn(N, D), torch.randn(V, D).double())
        assert name in HEADS


# --- DTensors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_argument_is_named(mesh, hidden):
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(t):
        return distribute_tensor(t, mesh, [Shard(0)])

    w, h = sharded(WEIGHT), sharded(hidden)
    match = r": expected a plain tensor, got a DTensor; gather it first \(.*full_tensor\(\)\), or use a loss of"
    rows = torch.arange(N)
    for argument, call in {
        "weight": lambda: lm_head_stats(hidden, w, TARGET),
        "weight ": lambda: lens_stats(hidden, rows, w, TARGET),
        "weight  ": lambda: linear_cross_entropy(hidden, w, TARGET, label_smoothing=0.1),
        "hidden": lambda: lm_head_stats(h, WEIGHT, TARGET),
        "hidden ": lambda: lm_head_stats(h[None], WEIGHT, TARGET),
        "norm_weight": lambda: lens_stats(hidden, rows, WEIGHT, TARGET, norm_weight=sharded(WEIGHT[0])),
        "class_weight": lambda: linear_cross_entropy(hidden, WEIGHT, TARGET, class_weight=sharded(WEIGHT[:, 0])),
        "x": lambda: gaussian_mmd(sharded(hidden[None]), call=0),
        "b": lambda: representation_distance(hidden[None], sharded(hidden[None])),
    }.items():
        with pytest.raises(ValueError, match="^" + argument.strip() + match):
            call()
    assert lm_head_stats(hidden, w.full_tensor(), TARGET).lse.equal(lm_head_stats(hidden, WEIGHT, TARGET).lse)

"""head_kl against its specification, on every backend this machine has."""

import itertools

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.ops.head_kl import head_kl, portable, reference

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]

# (N, V, D) and why
SHAPES = {
    "one row": (1, 97, 8),
    "one token": (3, 1, 8),
    "two tokens": (5, 2, 8),
    "two tiles, odd vocabulary": (131, 1003, 24),
    "several chunks of a row": (20, 4500, 16),
}
HEADS = {
    "plain": {},
    "scale, softcap, temperature": dict(scale=1.3, softcap=5.0, temperature=2.0),
}


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def draw(n, v, d, dtype=torch.float64, distance=0.5):
    """Student, teacher, weight, bias; the hidden states differ by ``distance`` standard deviations."""
    teacher = torch.randn(n, d, dtype=torch.float64)
    student = teacher + distance * torch.randn(n, d, dtype=torch.float64)
    weight, bias = torch.randn(v, d, dtype=torch.float64) * 0.5, torch.randn(v, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (student, teacher, weight, bias))


def gradients(fn, inputs, upstream):
    """The value and its gradients at fresh leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = fn(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def agreed(name, mine, exact, peer, ulps=32, spoil=False):
    """Assert that value and gradients agree; spoil: and that the very assertions can fail.

    From half precision the value comes in fp32, but of inputs, and of a difference of them, that were rounded.
    """
    dtype = mine[1][0].dtype
    half = {torch.bfloat16: 2.0**16, torch.float16: 2.0**13}.get(dtype)
    for i, (got, want, same) in enumerate(zip(*((v, *g) for v, g in (mine, exact, peer)), strict=True)):
        bound = half if half and i == 0 else ulps

        def check(x, want=want, same=same, bound=bound, i=i):
            assert_agrees(f"{name}: {i or 'value'}", x, want, same, ulps=bound)

        assert_catches_spoiled(check, got) if spoil else check(got)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(on_backend, shape, dtype, head):
    """With a bias, and upstream gradients that differ from row to row."""
    student, teacher, weight, bias = draw(*shape, dtype)
    upstream = torch.randn(shape[0], dtype=torch.float64)

    def ours(s, w, b):
        return head_kl(s, teacher, w, bias=b, **head)

    def spec(s, w, b):
        return reference.head_kl(s, teacher.to(s.dtype), w, b, **head)

    inputs = student, weight, bias
    exact = gradients(spec, [t.double() for t in inputs], upstream)
    mine, peer = gradients(ours, inputs, upstream), gradients(spec, inputs, upstream)
    ulps = 128 if dtype == torch.float64 else 32  # float64 has no peer of lower error to be measured against
    agreed("all", mine, exact, peer, ulps=ulps, spoil=shape[1] > 2 and shape[0] > 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_with_a_head_of_its_own(on_backend, dtype):
    student, teacher, weight, _ = draw(140, 517, 16, dtype)
    old = (weight + 0.1 * torch.randn_like(weight)).requires_grad_()
    upstream = torch.randn(140, dtype=torch.float64)

    def spec(s, w):
        own = dict(teacher_weight=old.to(s.dtype), softcap=20.0)
        return reference.head_kl(s, teacher.to(s.dtype), w, **own)

    def ours(s, w):
        return head_kl(s, teacher, w, teacher_weight=old, softcap=20.0)

    inputs = student, weight
    exact = gradients(spec, [t.double() for t in inputs], upstream)
    agreed("own head", gradients(ours, inputs, upstream), exact, gradients(spec, inputs, upstream), ulps=128)
    leaf = weight.clone().requires_grad_()
    head_kl(student, teacher.clone().requires_grad_(), leaf, teacher_weight=old).sum().backward()
    assert old.grad is None
    assert leaf.grad is not None


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5, 1e-7], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
def test_nothing_cancels_near_the_teacher(on_backend, distance, softcap):
    """In fp32 value and gradients keep their relative accuracy, row by row, down to a divergence of 1e-14."""
    student, teacher, weight, _ = draw(40, 3000, 32, torch.float32, distance)
    weight[:, 0] += 2.0  # the mean row of a head: a common shift of all logits, which says nothing

    def ours(s, w):
        return head_kl(s, teacher, w, softcap=softcap)

    def spec(s, w):
        """From the difference of hidden states, whose product is exact enough; the specification itself cancels."""
        t, zs = teacher.double(), s @ w.T
        a = t @ w.detach().T
        d = ((t - s) @ w.T).detach() - (zs - zs.detach())
        if softcap:
            a = torch.tanh(a / softcap)
            d = softcap * torch.tanh(d / softcap) * (1 - a * torch.tanh(torch.atanh(a) - d / softcap))
            a = a * softcap
        p = torch.softmax(a, 1).detach()
        u = d - (p * d).sum(1, keepdim=True).detach()
        x = (p * torch.expm1(-u)).sum(1)
        return (p * (torch.expm1(-u) + u)).sum(1) - (x - torch.log1p(x))

    upstream = torch.rand(40, dtype=torch.float64) + 0.5
    value, (ds, dw) = gradients(ours, (student, weight), upstream)
    want, (exact_s, exact_w) = gradients(spec, (student.double(), weight.double()), upstream)
    assert distance**2 * 0.1 < float(want.min())
    assert float(want.max()) < 100 * distance**2
    assert float(((value - want) / want).abs().max()) < 2e-5
    assert_agrees("student", ds, exact_s, ulps=256)
    assert_agrees("weight", dw, exact_w, ulps=256)
    for got, exact in ((ds, exact_s), (dw, exact_w)):
        assert_catches_spoiled(lambda x, e=exact: assert_agrees("gradient", x, e, ulps=256), got)
    # What the plain formula makes of it: noise, from some distance on.
    plain = reference.head_kl(student, teacher, weight, softcap=softcap)
    if distance < 1e-4:
        assert float(((plain - want) / want).abs().max()) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_near_the_teacher(on_backend, dtype):
    """One head: the difference of the hidden states is multiplied, so that rounded logits do not drown it."""
    student, teacher, weight, _ = draw(40, 1000, 64, dtype, 0.02)
    value = head_kl(student, teacher, weight)
    want = reference.head_kl(student.double(), teacher.double(), weight.double())
    assert float(((value - want) / want).abs().max()) < 0.1
    peer = reference.head_kl(student, teacher, weight)
    assert float(((value - want) / want).abs().mean()) < 0.25 * float(((peer - want) / want).abs().mean())


def test_the_same_hidden_states_diverge_by_nothing(on_backend):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        _, teacher, weight, bias = draw(9, 301, 8, dtype)
        value, grads = gradients(
            lambda s, w, b, t=teacher: head_kl(s, t, w, bias=b), (teacher, weight, bias), torch.ones(9)
        )
        assert not value.any()
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_far_from_the_teacher(on_backend, dtype):
    """Sure of another token, sure where the teacher is flat, and the reverse: sums in the ratio of V or 1 / V."""
    v = 5000
    weight = torch.eye(v, 4, dtype=dtype)
    weight[:, 3] = torch.linspace(-1, 1, v, dtype=dtype)
    sure, other = torch.tensor([60.0, 0, 0, 0.5]), torch.tensor([0, 60.0, 0, 0.5])
    flat, tilted = torch.tensor([0, 0, 0, 0.1]), torch.tensor([0, 0, 0, 3.0])
    pairs = [(a, b) for a in (sure, other, flat, tilted) for b in (sure, other, flat, tilted) if a is not b]
    teacher, student = (torch.stack(x).to(dtype) for x in zip(*pairs, strict=True))
    upstream = torch.linspace(0.5, 1.5, len(pairs), dtype=torch.float64)
    mine = gradients(lambda s, w: head_kl(s, teacher, w), (student, weight), upstream)
    spec = gradients(
        lambda s, w: reference.head_kl(s, teacher.double(), w), (student.double(), weight.double()), upstream
    )
    assert float(((mine[0] - spec[0]) / spec[0]).abs().max()) < (1e-12 if dtype == torch.float64 else 3e-6)
    agreed("far", mine, spec, spec, ulps=256)


def test_gradient_passes_gradcheck(on_backend):
    student, teacher, weight, bias = (t.requires_grad_() for t in draw(3, 7, 4))

    def fn(s, w, b, t):
        old = t.detach()
        return head_kl(s, old, w, bias=b, scale=0.7, softcap=4.0, temperature=1.5)

    # Through the student's logits alone: a finite difference in the weight would move the teacher's too.
    assert torch.autograd.gradcheck(lambda s: fn(s, weight, bias, teacher), (student,))
    frozen = weight.detach().clone()
    assert torch.autograd.gradcheck(
        lambda s, w: head_kl(s, teacher.detach(), w, teacher_weight=frozen, softcap=4.0), (student, weight)
    )


@pytest.mark.parametrize("wanted", [c for k in (1, 2) for c in itertools.combinations(range(3), k)], ids=str)
def test_frozen_inputs_cost_nothing_and_change_nothing(on_backend, wanted, monkeypatch):
    impl = backend.choose("head_kl", torch.device("cpu"))
    seen, inner = [], impl.backward
    monkeypatch.setattr(impl, "backward", lambda *a: seen.append(a[-3:]) or inner(*a))
    student, teacher, weight, bias = draw(6, 30, 8, torch.float32)
    got = []
    for which in (wanted, range(3)):
        leaves = [t.clone().requires_grad_(i in which) for i, t in enumerate((student, weight, bias))]
        head_kl(leaves[0], teacher, leaves[1], bias=leaves[2]).sum().backward()
        assert [i for i, t in enumerate(leaves) if t.grad is not None] == list(which)
        got.append([leaves[i].grad for i in wanted])
    assert seen[0] == tuple(i in wanted for i in range(3))
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_strides_and_no_rows(on_backend):
    student, teacher, weight, _ = draw(12, 40, 8)
    wide = torch.randn(12, 16, dtype=torch.float64)
    wide[:, ::2] = student
    strided = head_kl(wide[:, ::2], teacher.t().contiguous().t(), weight.t().contiguous().t())
    assert_agrees("value", strided, head_kl(student, teacher, weight))
    leaves = student[:0].requires_grad_(), weight.clone().requires_grad_()
    none = head_kl(leaves[0], teacher[:0], leaves[1])
    assert none.shape == (0,)
    grads = torch.autograd.grad(none.sum(), leaves)
    assert grads[0].shape == (0, 8)
    assert not grads[1].any()


def test_nan_is_reported_not_hidden(on_backend):
    for name in range(2):
        inputs = list(draw(5, 300, 8, torch.float32)[:3])
        inputs[name][2, 3] = float("nan")
        assert head_kl(*inputs).isnan().tolist() == [False, False, True, False, False]


def test_never_holds_both_models_logits(on_backend, monkeypatch):
    """One tile of rows at a time."""
    rows, inner = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: rows.append(a[0].shape[0]) or inner(*a, **k))
    student, teacher, weight, _ = draw(300, 40, 8)
    head_kl(student, teacher, weight)
    assert rows == [256, 256, 88]
    assert portable.TILE == 128


@pytest.mark.parametrize("change", [dict(), dict(bias=True), dict(own=True)], ids=str)
def test_opcheck(on_backend, change):
    student, teacher, weight, bias = draw(5, 11, 4, torch.float32)
    b = bias.requires_grad_() if "bias" in change else None
    old = weight.clone() if "own" in change else None
    args = student.requires_grad_(), teacher, weight.requires_grad_(), b, old, 1.5, 8.0
    torch.library.opcheck(torch.ops.fastguard.head_kl.default, args)
    _, lse, gap = torch.ops.fastguard.head_kl(*args)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    more = lse.detach(), gap.detach(), True, True, b is not None
    torch.library.opcheck(torch.ops.fastguard.head_kl_backward.default, (torch.rand(5), *detached, *more))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(on_backend, compiler):
    if compiler == "inductor" and on_backend != "cpu":
        pytest.skip("inductor is checked on one backend: it takes 12 s")
    student, teacher, weight, bias = draw(9, 61, 8, torch.float32)
    leaves = student.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()

    def loss(s, w, b):
        return (head_kl(s, teacher, w, bias=b, softcap=10.0, temperature=2.0) * 4).mean()

    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    want, got = loss(*leaves), compiled(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "student": (lambda a: a | {"student": a["student"][None]}, r"student: expected \[N, D\]"),
    "student dtype": (lambda a: {k: t.int() for k, t in a.items()}, "student: expected a dtype"),
    "teacher": (lambda a: a | {"teacher": a["teacher"][:-1]}, "teacher: expected the shape of student"),
    "weight": (lambda a: a | {"weight": a["weight"][:, :-1]}, r"weight: expected \[V, 8\]"),
    "empty weight": (lambda a: a | {"weight": a["weight"][:0]}, r"weight: expected \[V, 8\]"),
    "weight dtype": (lambda a: a | {"weight": a["weight"].double()}, "weight: expected the dtype of student"),
    "bias": (lambda a: a | {"bias": torch.zeros(3)}, r"bias: expected \[20\]"),
    "own": (lambda a: a | {"teacher_weight": a["weight"][:3]}, "teacher_weight: expected the shape of weight"),
    "both": (lambda a: a | {"teacher_weight": a["weight"], "bias": torch.zeros(20)}, "bias: expected None"),
    "softcap": (lambda a: a | {"softcap": 0.0}, "softcap: expected a positive number"),
    "temperature": (lambda a: a | {"temperature": -1.0}, "temperature: expected a positive number"),
    "device": (lambda a: a | {"weight": a["weight"].to("meta")}, "weight: expected device cpu"),
}


@pytest.mark.parametrize("change", BAD)
def test_errors_name_the_argument(change):
    spoil, message = BAD[change]
    student, teacher, weight, _ = draw(5, 20, 8, torch.float32)
    with pytest.raises(ValueError, match=f"^{message}"):
        head_kl(**spoil(dict(student=student, teacher=teacher, weight=weight)))

"""class_moments_ against its specification, on every backend this machine has."""

import numpy as np
import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard import backend
from fastguard.ops.class_moments import class_moments_, reference

BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(reason is not None, reason=f"{b}: {reason}"))
    for b in ("cpu", "portable")
    for reason in [backend.unavailable(b, "cpu")]
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


def states(classes, places, width, dtype=torch.float32):
    """count, mean, mean_rest, second, second_rest; the rests are None in float64."""
    rests = [torch.zeros(classes, places, width) if dtype == torch.float32 else None for _ in range(2)]
    mean, second = (torch.zeros(classes, places, width, dtype=dtype) for _ in range(2))
    return torch.zeros(classes, dtype=torch.int64), mean, rests[0], second, rests[1]


def take(state, x, label, positions, seconds=True):
    count, mean, mean_rest, second, second_rest = state
    more = {"second": second, "second_rest": second_rest} if seconds else {}
    class_moments_(count, mean, mean_rest, x, label, positions=positions, **more)


def exact(state):
    """(mean, second) in float64."""
    _, mean, mean_rest, second, second_rest = state
    return [n.double() + (0 if r is None else r.double()) for n, r in ((mean, mean_rest), (second, second_rest))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["the same positions", "positions of its own"])
def test_matches_reference(on_backend, dtype, own):
    """Three batches, one without a sample of class 1; samples that are left out; more features than a chunk."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state, xs, labels, places = states(3, 2, 600, wide), [], [], []
    for size, allowed in ((5, [-1, 0, 1, 2]), (4, [0, 2]), (7, [-1, 1, 2])):
        x = (3 + torch.randn(size, 6, 600, dtype=torch.float64)).to(dtype)
        label = torch.tensor(allowed)[torch.randint(len(allowed), (size,))]
        positions = torch.randint(-6, 6, (size, 2)) if own else [-5, 3]
        take(state, x, label, positions)
        xs.append(x.double())
        labels.append(label)
        places.append(positions if own else torch.tensor(positions).expand(size, 2))
    count, mean, second = reference.moments(torch.cat(xs), torch.cat(labels), 3, torch.cat(places))
    assert torch.equal(state[0], count)
    found = exact(state)
    ulps = 64.0 if wide == torch.float64 else 2.0**9  # pairs of fp32 have 48 bits
    for name, got, want in (("mean", found[0], mean), ("second", found[1], second)):
        assert_catches_spoiled(
            lambda g, name=name, want=want: assert_agrees(name, g.view(want.shape), want, ulps=ulps),
            got.view(6, 600),
        )
    only = states(3, 2, 600, wide)
    for x, label, at in zip(xs, labels, places, strict=True):
        take(only, x.to(dtype), label, at, seconds=False)
    assert torch.equal(only[1], state[1]) and not only[3].any()


def test_a_million_samples_lose_nothing(on_backend):
    """A mean a thousand deviations from 0; a running fp32 sum of as many is checked to fail the same bound."""
    batches, size, width = (250, 4000, 4) if on_backend == "cpu" else (100, 10000, 4)
    state = states(2, 1, width)
    total, squares, naive = (torch.zeros(2, width, dtype=d) for d in (torch.float64, torch.float64, torch.float32))
    label = torch.arange(size) % 2
    member = torch.stack([label == 0, label == 1]).double()
    offset = torch.tensor([1000.0, -1000.0, 3000.0, 777.0])
    for _ in range(batches):
        x = offset + torch.randn(size, width)
        take(state, x[:, None], label, [0])
        total += member @ (x.double() - offset.double())
        squares += member @ (x.double() - offset.double()).square()
        for c in (0, 1):
            rows = torch.cat([naive[c : c + 1], x[label == c]]).numpy()
            naive[c] = torch.from_numpy(np.cumsum(rows, 0, np.float32)[-1])
    count = batches * size / 2
    assert state[0].tolist() == [count, count] and 2 * count == 1e6
    mean = offset.double() + total / count
    second = squares - total.square() / count
    found = [x[:, 0] for x in exact(state)]
    assert float(((found[0] - mean) / mean).abs().max()) < 1e-9
    assert float(((state[1][:, 0].double() - mean) / mean).abs().max()) < 1e-6
    assert float(((found[1] - second) / second).abs().max()) < 1e-6
    assert float(((naive.double() / count - mean) / mean).abs().max()) > 1e-6


def test_float64_is_kept_in_float64_and_fp32_may_be(on_backend):
    x = 1e8 + torch.randn(40, 1, 6, dtype=torch.float64)
    state = states(1, 1, 6, torch.float64)
    for part in x.split(7):
        take(state, part, torch.zeros(len(part), dtype=torch.long), None)
    assert_agrees("second", state[3][0, 0], (x - x.mean(0)).square().sum(0)[0], ulps=2.0**28)
    wide = states(1, 1, 6, torch.float64)
    take(wide, x.float(), torch.zeros(40, dtype=torch.int32), None)
    assert_agrees("mean", wide[1][0, 0], x.float().double().mean(0)[0])


def test_one_call_a_layer(on_backend):
    """Views of a state of all layers, activations on strides of their own, that require grad."""
    layers = [torch.randn(3, 9, 20, requires_grad=True) for _ in range(2)]
    count, mean, rest = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, 5, 20), torch.zeros(2, 2, 5, 20)
    label = torch.tensor([1, 0, 1])
    for i, x in enumerate(layers):
        view = x[..., ::1].transpose(0, 1).contiguous().transpose(0, 1) if i else x
        class_moments_(count[i], mean[i], rest[i], view, label, positions=range(-5, 0))
    assert count.tolist() == [[1, 2], [1, 2]] and not mean.requires_grad
    for i, x in enumerate(layers):
        torch.testing.assert_close(mean[i, 0], x[1, -5:].detach())
        torch.testing.assert_close(mean[i, 1], x[[0, 2], -5:].detach().mean(0))
    every_other = torch.randn(3, 4, 40)[..., ::2]
    mean, rest, count = torch.zeros(2, 4, 20), torch.zeros(2, 4, 20), torch.zeros(2, dtype=torch.long)
    class_moments_(count, mean, rest, every_other, label)
    torch.testing.assert_close(mean[0], every_other[1])


def test_what_is_not_finite_is_seen(on_backend):
    x = torch.randn(2, 1, 4)
    x[0, 0, 1], x[1, 0, 2] = float("nan"), float("inf")
    state = states(2, 1, 4)
    for _ in range(2):
        take(state, x, torch.tensor([0, 1]), None)
    assert (~torch.isfinite(exact(state)[0][:, 0])).tolist() == [
        [False, True, False, False],
        [False, False, True, False],
    ]


def test_nothing_to_take(on_backend):
    state = states(2, 3, 4)
    take(state, torch.randn(0, 3, 4), torch.zeros(0, dtype=torch.long), None)
    take(state, torch.full((2, 3, 4), float("nan")), torch.tensor([-1, -1]), None)
    assert not any(t.any() for t in state)


def test_opcheck_compile_and_autocast(on_backend):
    x, label, at = torch.randn(3, 4, 10), torch.tensor([0, 1, -1]), torch.tensor([-1, 2])
    op = torch.ops.fastguard.class_moments_
    if on_backend == "portable":
        torch.library.opcheck(op, (*states(2, 2, 10), x, label, at))

    def run(x, label, count, mean, rest):
        y = x.relu()
        class_moments_(count, mean, rest, y, label, positions=(-1, 2))
        return mean.sum() + y.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, theirs = states(2, 2, 10)[:3], states(2, 2, 10)[:3]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x, label, *ours), run(x, label, *theirs))
    assert all(map(torch.equal, ours, theirs)) and ours[0].tolist() == [2, 2]
    version = ours[1]._version
    run(x, label, *ours)
    assert ours[1]._version > version


N, M, X, L = (
    torch.zeros(2, dtype=torch.long),
    torch.zeros(2, 3, 4),
    torch.zeros(5, 3, 4),
    torch.zeros(5, dtype=torch.long),
)
ERRORS = {
    "x": ((N, M, M, X[0], L), {}),
    "x dtype": ((N, M, M, X.long(), L), {}),
    "label": ((N, M, M, X, L[:2]), {}),
    "label dtype": ((N, M, M, X, L.float()), {}),
    "label range": ((N, M, M, X, L + 2), {}),
    "label negative": ((N, M, M, X, L - 2), {}),
    "label device": ((N, M, M, X, L.to("meta")), {}),
    "count": ((N.float(), M, M, X, L), {}),
    "mean": ((N, M[:1], M, X, L), {}),
    "mean width": ((N, M[..., :2], M, X, L), {}),
    "mean dtype": ((N, M.bfloat16(), M, X, L), {}),
    "mean narrow": ((N, M, M, X.double(), L), {}),
    "mean strides": ((N, M.transpose(1, 2).contiguous().transpose(1, 2), M, X, L), {}),
    "mean_rest": ((N, M, None, X, L), {}),
    "mean_rest too many": ((N, M.double(), M.double(), X, L), {}),
    "mean_rest shape": ((N, M, M[:1], X, L), {}),
    "second": ((N, M, M, X, L), {"second": M[:1], "second_rest": M}),
    "second_rest": ((N, M, M, X, L), {"second": M}),
    "second_rest too many": ((N, M, M, X, L), {"second_rest": M}),
    "positions": ((N, M, M, X, L), {"positions": [0, 1]}),
    "positions range": ((N, M, M, X, L), {"positions": [0, 1, 3]}),
    "positions each": ((N, M, M, X, L), {"positions": torch.zeros(5, 2, dtype=torch.long)}),
    "positions each range": ((N, M, M, X, L), {"positions": torch.full((5, 3), -4)}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    arguments, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        class_moments_(*arguments, **options)

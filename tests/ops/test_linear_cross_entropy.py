"""linear_cross_entropy against torch's cross-entropy on explicit logits."""

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

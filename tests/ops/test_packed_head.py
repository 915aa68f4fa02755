"""A head that is packed once for many tiles: the same numbers, and gone when it is let go of."""

import pytest
import torch

import tiny_models
from fastguard import RepNoiseLoss, backend
from fastguard.ops.lm_head_stats import lm_head_stats, packed
from fastguard.ops.lm_head_stats.op import TILE

pytestmark = [
    pytest.mark.skipif(not hasattr(torch.ops.mkl, "_mkl_linear"), reason="torch was built without MKL"),
    pytest.mark.skipif(backend.unavailable("cpu", "cpu") is not None, reason="no C++ backend"),
]


def draw(rows, v=301, d=24):
    return torch.randn(rows, d), torch.randn(v, d), torch.randint(0, v, (rows,))


@pytest.mark.parametrize("last", [TILE, TILE - 7, 5])
def test_statistics_are_the_same_of_a_packed_head(last):
    hidden, weight, target = draw((packed.AFTER + 2) * TILE + last)
    exact = lm_head_stats(hidden.double(), weight.double(), target)
    packed.constant(weight)
    found = lm_head_stats(hidden, weight, target)
    assert isinstance(packed._heads[weight], torch.Tensor), "it was read for more tiles than packing waits for"
    for mine, want in zip(found[:3], exact[:3], strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)
    packed.release(weight)
    weight *= 2
    doubled = lm_head_stats(hidden, weight, target)
    torch.testing.assert_close(doubled.target_logit, 2 * found.target_logit)


def test_no_head_is_packed_that_nobody_called_constant():
    hidden, weight, target = draw(8 * TILE)
    lm_head_stats(hidden, weight, target)
    assert weight not in packed._heads


def test_a_loss_packs_its_head_for_one_forward(monkeypatch):
    made = []
    pack = torch.ops.mkl._mkl_reorder_linear_weight
    monkeypatch.setattr(packed, "AFTER", 1)
    monkeypatch.setattr(torch.ops.mkl, "_mkl_reorder_linear_weight", lambda *a: made.append(a[0]) or pack(*a))
    model = tiny_models.tiny()
    harmful, harmless = tiny_models.pair(batch=4, length=64)
    loss = RepNoiseLoss(model, mask_padding=False)
    value = loss(harmful=harmful, harmless=harmless)
    assert len(made) == 1 and made[0] not in packed._heads
    value.backward()
    loss(harmful=harmful, harmless=harmless)
    assert len(made) == 2, "the weights may be others by the next forward"
    loss.close()

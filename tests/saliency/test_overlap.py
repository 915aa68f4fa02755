"""Overlap of sets and of subspaces, against numbers that are known."""

import pytest
import torch

from fastguard.saliency import overlap
from fastguard.saliency.overlap import counts, jaccard, jaccard_by, subspace_overlap


def packed(mask):
    """Eight entries in a byte, the lowest bit first, zeros behind the last."""
    flat = torch.nn.functional.pad(mask.flatten().int(), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8)).sum(1).to(torch.uint8)


def test_a_set_counted_by_hand():
    a = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1]]).bool()
    b = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    for x, y in ((a, b), (packed(a), packed(b))):
        assert counts(x, y) == (2, 6)
        assert jaccard(x, y) == jaccard(y, x) == pytest.approx(1 / 3)
        assert jaccard(x, x) == 1.0
    assert jaccard(a, ~a) == 0.0
    assert jaccard(a & ~a, a & ~a) == 1.0 and jaccard(a, a & ~a) == 0.0


def test_packed_masks_count_as_boolean_ones(monkeypatch):
    """No multiple of eight, several tiles, all 256 bytes."""
    monkeypatch.setattr(overlap, "TILE", 100)
    for n in (1, 7, 8, 5003):
        a, b = torch.rand(n) < 0.5, torch.rand(n) < 0.3
        assert counts(packed(a), packed(b)) == counts(a, b) == (int((a & b).sum()), int((a | b).sum()))
    every = torch.arange(256, dtype=torch.uint8)
    assert counts(every, every) == (1024, 1024)


def test_by_layer_tensor_and_model():
    """Layers are joined by counts, not by means of their tensors' indices."""
    names = ["model.layers.0.q.weight", "model.layers.0.mlp.experts.3.weight", "model.layers.10.q.weight", "head"]
    on, off = torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    one = off.clone()
    one[0, 0] = True
    a = dict(zip(names, [on, one, one, off], strict=True))
    b = dict(zip(names, [on, ~one, on, off], strict=True))
    by_tensor = dict(zip(names, [1.0, 0.0, 1 / 8, 1.0], strict=True))
    assert jaccard_by(a, b, by="tensor") == by_tensor
    assert jaccard_by(a, b) == {"model.layers.0": 8 / 16, "model.layers.10": 1 / 8, "head": 1.0}
    assert jaccard_by(a, b, by="model") == {"model": 9 / 24}
    compact = [{n: packed(m) for n, m in masks.items()} for masks in (a, b)]
    assert jaccard_by(*compact) == jaccard_by(a, b)


def test_subspaces():
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64))[0]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    a = q[:, :6]
    assert subspace_overlap(a, a @ turn) == pytest.approx(1)  # a basis of the same
    assert subspace_overlap(a, q[:, 6:]) == pytest.approx(0, abs=1e-20)
    assert subspace_overlap(a, q[:, 3:15]) == pytest.approx(3 / 6)
    assert subspace_overlap(q[:, 3:15], a) == pytest.approx(3 / 6)
    tilted = torch.cat([q[:, :5], 0.6 * q[:, 5:6] + 0.8 * q[:, 7:8]], 1)
    assert subspace_overlap(a, tilted) == pytest.approx((5 + 0.36) / 6)
    assert subspace_overlap(a.float(), q[:, 3:15].float()) == pytest.approx(3 / 6, abs=1e-6)


def test_errors_name_the_argument():
    mask, basis = torch.ones(4, dtype=torch.bool), torch.eye(5)[:, :2]
    with pytest.raises(ValueError, match=r"a: expected a mask, bool or packed uint8, got torch.float32"):
        jaccard(mask.float(), mask)
    with pytest.raises(ValueError, match=r"b: expected torch.bool \[4\] as a, got torch.uint8"):
        jaccard(mask, packed(mask))
    with pytest.raises(ValueError, match=r"b: expected torch.bool \[4\] as a, got torch.bool \[3\]"):
        jaccard(mask, mask[:3])
    with pytest.raises(ValueError, match="by: expected tensor, layer or model, got 'row'"):
        jaccard_by({}, {}, by="row")
    with pytest.raises(ValueError, match="b: expected the names of a, got 'w'"):
        jaccard_by({"w": mask}, {})
    with pytest.raises(ValueError, match="w: b: expected"):
        jaccard_by({"w": mask}, {"w": mask[:2]})
    with pytest.raises(ValueError, match="b: expected orthonormal columns"):
        subspace_overlap(basis, 2 * basis)
    with pytest.raises(ValueError, match="a: expected orthonormal columns"):
        subspace_overlap(basis * torch.nan, basis)
    with pytest.raises(ValueError, match=r"b: expected \[5, r\]"):
        subspace_overlap(basis, torch.eye(4))
    with pytest.raises(ValueError, match="a: expected"):
        subspace_overlap(basis[:, :0], basis)

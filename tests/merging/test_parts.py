"""What merges are made of: chance that is the same for ever, exact trimming, parameters by tensor, cosines."""

import hashlib

import pytest
import torch

from fastguard.merging import arithmetic
from fastguard.merging.drop import keep
from fastguard.merging.options import SafeLora
from fastguard.merging.parameters import checked, value_at
from fastguard.merging.safe_lora import chosen, factor_cosine, projection
from fastguard.merging.trim import Largest
from merging import plain


def test_chance_depends_on_seed_model_tensor_and_place_alone():
    given = dict(seed=3, tensor="w", model=0)
    whole = keep(1003, 0, 0.3, **given)
    parts = torch.cat([keep(400, 0, 0.3, **given), keep(4, 400, 0.3, **given), keep(599, 404, 0.3, **given)])
    assert torch.equal(whole, parts)
    for change in ({"seed": 4}, {"seed": 3 + 2**32}, {"tensor": "v"}, {"model": 1}):
        assert 0.3 < float((keep(1003, 0, 0.3, **{**given, **change}) == whole).float().mean()) < 0.7
    assert keep(10, 0, 1.0, **given).all() and not keep(10, 0, 0.0, **given).any()
    with pytest.raises(ValueError, match="multiple of 4"):
        keep(10, 3, 0.5, **given)


def philox(counter, key):
    """Philox4x32-10 of Python's own integers (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_what_is_kept_is_fixed_by_its_definition():
    """A new version must drop the same weights."""
    assert philox([0] * 4, [0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's known answer
    name = int.from_bytes(hashlib.sha256(b"model.norm.weight").digest()[:8], "little")
    words = [w for i in range(5, 9) for w in philox([i, 2, name % 2**32, name >> 32], [7, 9])]
    kept = keep(16, 20, 0.37, seed=7 + (9 << 32), tensor="model.norm.weight", model=2)
    assert kept.tolist() == [w < round(0.37 * 2**32) for w in words]


@pytest.mark.parametrize("density", [0.01, 0.37, 0.9])
def test_as_many_are_kept_as_asked_for_and_neighbours_do_not_care(density):
    n = 200_000
    kept = keep(n, 0, density, seed=1, tensor="w", model=0).double()
    spread = (density * (1 - density) / n) ** 0.5
    assert abs(float(kept.mean()) - density) < 5 * spread
    for lag in (1, 2, 3, 4, 64):
        product = float(((kept[lag:] - density) * (kept[:-lag] - density)).mean())
        assert abs(product) < 5 * density * (1 - density) / n**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_are_exactly_those_of_a_stable_sort(dtype):
    g = torch.Generator().manual_seed(0)
    full = torch.randn(3000, generator=g, dtype=dtype)
    cases = {
        "any": full,
        "ties": full.mul(3).round(),  # magnitudes of a few values, many of them zero
        "one value": torch.full((500,), -0.25, dtype=dtype),
        "zeros": torch.zeros(300, dtype=dtype),
        "far apart": torch.tensor([1e-38, -1e30, 3e-39, 0.0, -1e-45, 1e30], dtype=dtype),
    }
    for name, numbers in cases.items():
        for count in {1, 2, len(numbers) // 3, len(numbers) - 1, len(numbers)}:
            cuts = list(numbers.split(257))
            largest = Largest(lambda cuts=cuts: iter(cuts), dtype, count)
            found = torch.cat([largest.of(c) for c in cuts])
            expected, order = torch.zeros_like(numbers), torch.sort(numbers.abs(), descending=True, stable=True)[1]
            expected[order[:count]] = numbers[order[:count]]
            assert torch.equal(found, expected), (name, count)
    assert not Largest(lambda: iter([full]), dtype, 0).of(full).any()


def test_slerp_of_what_lies_on_a_line_is_lerp():
    a = torch.randn(300, dtype=torch.float64)
    for b in (2 * a, -a, torch.zeros(300, dtype=torch.float64)):
        assert arithmetic.slerp_shares(a, b, 0.3) == (0.7, 0.3)
    first, second = arithmetic.slerp_shares(torch.tensor([1.0, 0]), torch.tensor([0, 2.0]), 0.5)
    assert first == pytest.approx(0.5**0.5) and second == pytest.approx(0.5**0.5)


def test_parameters_by_layer_and_by_name():
    by = checked("t", [{"filter": "attn", "value": [0, "1e0"]}, {"filter": "*", "value": 0.25}])
    assert value_at("t", by, "model.layers.0.attn.q", 5) == 0 and value_at("t", by, "model.layers.4.attn.q", 5) == 1
    assert value_at("t", by, "model.layers.1.attn.q", 5) == 0.25 and value_at("t", by, "model.layers.3.mlp", 5) == 0.25
    three = checked("t", [0, 1, 0.5])
    assert [value_at("t", three, f"layers.{i}.w", 5) for i in range(5)] == [0, 0.5, 1, 0.75, 0.5]
    assert value_at("t", three, "lm_head.weight", 5) == 0  # as in mergekit
    assert value_at("t", checked("t", 2), "any", 1) == 2.0


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_projections_in_either_order(shape):
    g = torch.Generator().manual_seed(0)
    v, d = (torch.randn(*shape, dtype=torch.float64, generator=g) for _ in range(2))
    b = torch.randn(shape[0], 3, dtype=torch.float64, generator=g)
    c = v @ v.T / v.norm()
    published = projection(v, SafeLora(), "m")
    torch.testing.assert_close(published(d), c @ d)
    torch.testing.assert_close(published(b), c @ b)
    assert float((c @ c - c).norm()) > 0.1 * float(c.norm())  # the published one is no projector
    true = projection(v, SafeLora(projector=True, rank=5), "m")
    torch.testing.assert_close(true(d), plain.projector(v, torch.zeros_like(v), 5) @ d)
    torch.testing.assert_close(true(true(d)), true(d))
    assert projection(torch.zeros_like(v), SafeLora(), "m") is None


def test_the_projector_of_a_large_matrix_finds_its_strongest_directions():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(200, 4, generator=g), torch.randn(4, 160, generator=g)
    v = left @ right + 1e-3 * torch.randn(200, 160, generator=g)
    d = torch.randn(200, 7, generator=g)
    state = torch.get_rng_state()
    mine = projection(v, SafeLora(projector=True, rank=4), "m")(d)
    assert torch.equal(torch.get_rng_state(), state)
    exact = plain.projector(v.double(), torch.zeros_like(v).double(), 4) @ d.double()
    assert float((mine - exact).norm() / exact.norm()) < 1e-5


def test_the_cosine_of_factors_is_that_of_their_products():
    g = torch.Generator().manual_seed(0)
    a, b, v = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((4, 30), (20, 4), (20, 30)))
    turned = projection(v, SafeLora(), "m")(b)
    assert factor_cosine(turned, b, a) == pytest.approx(plain.cosine(turned @ a, b @ a), rel=1e-12)
    assert factor_cosine(torch.zeros_like(b), b, a) == 0


def test_the_lowest_are_chosen_with_those_equal_to_the_last():
    cosines = {"a": 0.5, "b": 0.1, "c": 0.3, "d": 0.3}
    assert chosen(cosines, SafeLora(lowest=2)) == ["b", "c", "d"]  # as published: at most the second lowest
    assert chosen(cosines, SafeLora(tau=0.3)) == ["b", "c", "d"] and chosen(cosines, SafeLora(tau=0.0)) == []
    assert chosen(cosines, SafeLora()) == list(cosines) and chosen({}, SafeLora()) == []

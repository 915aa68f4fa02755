"""The noise: published integers, normals by their definition, and the same values however they are sharded."""

import math

import pytest
import torch

from fastguard import backend
from fastguard.ops import philox
from fastguard.ops.philox import BLOCK, gaussian_noise, noise_slice, philox4x32

# counter, key and output of the known-answer tests that come with Random123, philox 4x32 of 10 rounds
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
cpp = pytest.mark.skipif(backend.unavailable("cpu", "cpu") is not None, reason="no C++ kernels")


def integers(text):
    return [int(word, 16) for word in text.split()]


def seed_of(key):
    low, high = integers(key)
    return low | high << 32


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter, key, output):
    words = philox4x32(tuple(torch.tensor(w) for w in integers(counter)), seed_of(key))
    assert [int(w) for w in words] == integers(output)


@cpp
def test_known_answers_of_the_kernels_and_equal_integers():
    for counter, key, output in KNOWN:
        words = torch.zeros(1, 4, dtype=torch.int64)
        seed = philox.seed_int64(seed_of(key))
        torch.ops.fastguard_c.philox4x32(torch.tensor([integers(counter)]), seed, words)
        assert words[0].tolist() == integers(output)
    counters = torch.randint(0, 2**32, (1000, 4))
    words = torch.zeros_like(counters)
    torch.ops.fastguard_c.philox4x32(counters, -12345, words)
    assert torch.equal(torch.stack(philox4x32(tuple(counters.T), -12345), 1), words)


def one_normal(seed, call, layer, sample, feature):
    """By the definition in the module's docstring, in Python's own arithmetic."""
    lane, word = feature % 16, feature // 16 % 4
    counter = (16 * (feature // 64) + lane, sample, layer, call % 2**32)
    words = [int(w) for w in philox4x32(tuple(torch.tensor(c) for c in counter), seed)]
    p, q = words[:2] if word < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(((p >> 9) + 0.5) * 2**-23))
    angle = 2 * math.pi * (q >> 8) * 2**-24
    return radius * (math.sin(angle) if word % 2 else math.cos(angle))


@pytest.fixture(params=["portable", pytest.param("cpu", marks=cpp)])
def on_backend(request, monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_noise_is_what_the_documentation_says(on_backend, dtype):
    seed, call, layer, offset = 2**40 + 17, 5, 3, 1000
    noise = gaussian_noise(3, 201, seed=seed, call=torch.tensor(call), layer=layer, sample_offset=offset, dtype=dtype)
    assert noise.dtype == dtype
    for sample, feature in [(0, 0), (0, 1), (1, 15), (1, 16), (2, 47), (2, 48), (0, 63), (2, 64), (1, 200)]:
        want = one_normal(seed, call, layer, offset + sample, feature)
        assert abs(float(noise[sample, feature]) - want) < (1e-12 if dtype == torch.float64 else 1e-6)


@cpp
def test_backends_agree_on_every_normal(monkeypatch):
    """A million normals, the tails among them: within 1e-6 in fp32, 1e-14 in float64."""
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        made = []
        for name in ("cpu", "portable"):
            monkeypatch.setenv("FASTGUARD_BACKEND", name)
            made.append(gaussian_noise(4, 2**18 if dtype == torch.float32 else 2**12, seed=9, dtype=dtype))
        assert float((made[0] - made[1]).abs().max()) < bound
    assert float(made[0].abs().max()) > 3.5


def test_noise_does_not_depend_on_how_it_is_sharded(on_backend):
    whole = gaussian_noise(5, 300, seed=1, call=torch.tensor(2), layer=3, sample_offset=4)
    later = gaussian_noise(3, 300, seed=1, call=torch.tensor(2), layer=3, sample_offset=6)
    assert torch.equal(whole[2:], later)
    shorter = gaussian_noise(5, 77, seed=1, call=torch.tensor(2), layer=3, sample_offset=4)
    assert torch.equal(whole[:, :77], shorter)
    options = dict(seed=1, call=torch.tensor(2), layer=3, sample_offset=4, dtype=torch.float32)
    for first, last in [(0, 1), (63, 65), (100, 300), (BLOCK, 2 * BLOCK)]:
        part = noise_slice(5, first, last, **options)
        assert float((part - whole[:, first:last]).abs().max()) < 1e-6


def test_every_coordinate_makes_other_noise(on_backend):
    base = dict(seed=1, call=torch.tensor(2), layer=3, sample_offset=4)
    first = gaussian_noise(2, 128, **base)
    for change in (
        {"seed": 2}, {"seed": 1 + 2**32}, {"seed": -1}, {"call": torch.tensor(3)}, {"layer": 4}, {"sample_offset": 6}
    ):  # fmt: skip
        other = gaussian_noise(2, 128, **(base | change))
        assert float((first == other).double().mean()) < 0.02
    assert torch.equal(first, gaussian_noise(2, 128, **(base | {"seed": 1 + 2**64})))
    assert torch.equal(first, gaussian_noise(2, 128, **(base | {"call": torch.tensor(2 + 2**32)})))


def test_moments_and_independence(on_backend):
    """Bounds are five standard errors of 2^18 samples."""
    n = 2**18
    z = gaussian_noise(4, n // 4, seed=11, call=torch.tensor(7)).double()
    flat = z.flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(flat.pow(power).mean()) - moment) < 5 * math.sqrt(variance / n)
    bound = 5 / math.sqrt(n / 4)
    for lag in (1, 15, 16, 17, 32, 48, 64):  # lanes, words of a counter, blocks
        assert abs(float((z[:, lag:] * z[:, :-lag]).mean())) < bound
    assert abs(float((z[0] * z[1]).mean())) < 2 * bound
    inside = float((flat.abs() < 1).double().mean())
    assert abs(inside - math.erf(math.sqrt(0.5))) < 5 * math.sqrt(0.22 / n)


def test_half_noise_is_rounded_fp32_noise(on_backend):
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(gaussian_noise(2, 70, seed=3, dtype=dtype), gaussian_noise(2, 70, seed=3).to(dtype))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"call": torch.zeros(1, dtype=torch.int64)}, "call"),
        ({"call": torch.tensor(1.0)}, "call"),
        ({"layer": -1}, "layer"),
        ({"layer": 2**32}, "layer"),
        ({"sample_offset": -1}, "sample_offset"),
        ({"sample_offset": 2**32 - 1}, "sample_offset"),
    ],
)
def test_errors_name_the_coordinate(options, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        gaussian_noise(2, 8, **options)


def test_too_many_features():
    with pytest.raises(ValueError, match=r"^features: expected at most"):
        gaussian_noise(1, 2**34 + 1)

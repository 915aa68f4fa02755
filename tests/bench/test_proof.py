"""A GPU kernel that has not passed its check on a device is not chosen there unless it is forced."""

from __future__ import annotations

import logging

import pytest
import torch

from fastguard import backend, proof

pytest.importorskip("triton")

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch, tmp_path):
    """A machine that has one, and a cache that holds no proof."""
    monkeypatch.setattr(proof, "gpu", lambda device: "A GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTGUARD_BACKEND", raising=False)
    for cached in (proof.unproven, backend._say):
        cached.cache_clear()
    yield
    for cached in (proof.unproven, backend._say):
        cached.cache_clear()


def test_without_a_proof_the_portable_backend_serves_and_one_line_says_how_to_prove(caplog):
    with caplog.at_level(logging.WARNING, "fastguard"):
        assert [backend.backend_name(op, DEVICE) for op in ("gram", "gram", "masks")] == ["portable"] * 3
    [line] = caplog.messages
    assert "not been checked against float64 on this A GPU: fastguard bench --gpu --check" in line


def test_what_has_passed_is_chosen_and_what_has_failed_is_not(caplog):
    proof.write(proof.identity(DEVICE), {"gram": "", "masks": "masks: packed, bfloat16: max error 1"})
    assert backend.backend_name("gram", DEVICE) == "triton"
    assert backend.backend_name("masks", DEVICE) == "portable" and "packed, bfloat16: max error 1" in caplog.text
    assert backend.backend_name("head_kl", DEVICE) == "portable", "it was not among what was checked"


@pytest.mark.parametrize("changed", proof.KEYS)
def test_a_proof_holds_for_its_gpu_kernels_and_versions_alone(changed):
    proof.write(proof.identity(DEVICE) | {changed: "another"}, {"gram": ""})
    assert backend.backend_name("gram", DEVICE) == "portable"


def test_a_forced_backend_needs_no_proof(monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", "triton")
    assert backend.backend_name("gram", DEVICE) == "triton"


def test_on_a_cpu_nothing_is_asked():
    assert backend.backend_name("gram", torch.device("cpu")) in ("cpu", "portable")
    assert not proof.file_of(dict.fromkeys(proof.KEYS, "a/b c")).name.count("/")

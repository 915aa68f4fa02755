"""Fixtures of the whole suite."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make a shared machine ten times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a cached graph may call an op as it was yesterday

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # side by side: each has its share of the cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell starts background jobs with Ctrl-C ignored; tests of interrupts need Python's own handler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    """Fresh but repeatable inputs; a failing test prints what it drew through its parameters."""
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """Uninitialised memory reads as NaN: a kernel that forgets to write an element cannot pass by luck."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def calls(monkeypatch):
    """How often ``add_project_rms_norm`` ran."""
    from fastguard.ops import add_project_rms_norm as fused_op

    made = []
    own = fused_op.add_project_rms_norm
    monkeypatch.setattr(fused_op, "add_project_rms_norm", lambda *a, **k: made.append(1) or own(*a, **k))
    return made

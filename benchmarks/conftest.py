"""Fixtures of the benchmarks; real activations, since what the lens skips depends on them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import measure

if torch.cuda.is_available():  # where kernels have no proof torch's own operations would be timed in their name
    os.environ.setdefault("FASTGUARD_BACKEND", "triton")


def pytest_addoption(parser):
    parser.addoption("--methods", help="defenses whose steps are benchmarked, by comma (bench_nested_steps.py)")


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(measure.machine())


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, fp32, and 8 x 129 tokens of Wikipedia prose."""
    from end_to_end.step import load, prose

    model, tokenizer = load()
    return model, prose(tokenizer, 8, 129)


@pytest.fixture(scope="session")
def activations(smollm2):
    """(hidden states [31][8, 128, 576], head weight, final norm weight, target ids [8, 128])."""
    model, ids = smollm2
    with torch.no_grad():
        hidden = model(ids[:, :-1], output_hidden_states=True, logits_to_keep=1).hidden_states
    return hidden, model.lm_head.weight.detach(), model.model.norm.weight.detach(), ids[:, 1:]

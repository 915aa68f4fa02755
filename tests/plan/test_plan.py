"""The plan against what runs here: products exactly, memory and collectives within a tenth; and its own arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from fastguard import methods, settings
from fastguard.plan import architecture, hardware, passes
from fastguard.plan.architecture import MODELS, find, from_config
from fastguard.plan.command import known
from fastguard.plan.cost import Recipe
from fastguard.plan.estimate import estimate, usable
from fastguard.plan.parts import Part, held, moments, peak
from fastguard.plan.setting import PRECISIONS, Efficiency, Setting
from launch import two_processes
from plan.live import Watch, held_by
from plan.workloads import (
    LLAMA_8B,
    PUBLISHED,
    SMOLLM2,
    TINY,
    build,
    compare,
    compare_method,
    ids,
    options_of,
    planned,
    setting,
)  # fmt: skip
from tiny_models import ARCHITECTURES, COMMON

TENTH = 0.10

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def here(name: str, s: Setting, **options: Any) -> Recipe:
    """The recipe of a method's step with its published options and these."""
    entry = methods.find(name)
    chosen = settings.build(entry.load_options(), options)
    return entry.load_cost().here(dataclasses.replace(s, given=frozenset(options)), chosen)


def published(name: str, s: Setting) -> Recipe:
    """That of the published step."""
    entry = methods.find(name)
    return entry.load_cost().published(s, entry.load_options()())


def close(found: float, expected: float, tolerance: float = TENTH) -> bool:
    return abs(found - expected) <= tolerance * expected


# Against runs.


BOTH_WAYS = [("fp32", True), ("bf16", False)]
"""Precision and checkpointing. The other two pairs have nothing that one of these has not."""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # bf16 rounds attackers' steps: memory and flops are the same
@pytest.mark.parametrize(("precision", "checkpointing"), BOTH_WAYS)
@pytest.mark.parametrize("name", known())
def test_a_step_multiplies_and_holds_what_the_plan_says(name, checkpointing, precision, monkeypatch):
    monkeypatch.setattr("fastguard.nested.narrow.SAMPLE", 2**10)  # watched in bf16; as large as this model otherwise
    model = build(TINY, precision, checkpointing)
    found = compare_method(methods.find(name), model, setting(model, precision, checkpointing))
    assert close(found.planned_flops, found.flops, 0.005), str(found)
    assert close(found.planned_memory, found.memory), str(found)


@pytest.mark.parametrize(("precision", "checkpointing"), BOTH_WAYS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_the_published_program_multiplies_and_holds_what_the_plan_says(name, checkpointing, precision):
    model = build(TINY, precision, checkpointing)
    found = compare(*PUBLISHED[name](model), model, published(name, setting(model, precision, checkpointing)))
    assert close(found.planned_flops, found.flops, 0.005), str(found)
    assert close(found.planned_memory, found.memory), str(found)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sft", {"retain_weight": 1.5}),
        ("repnoise", {"layers": 2}),
        ("tar", {"inner_steps": 5, "read_every": 2}),
        ("tar", {"batch": 3}),
        ("tar", {"adversaries": 2, "tamper_loss": "dpo"}),
        ("tar", {"adversaries": 3, "adversary": "lora", "adversary_rank": 4}),
        ("seam", {"product": "difference"}),
        ("circuit_breaker", {"retain_states": "all"}),
    ],
)
def test_options_change_the_step_and_the_plan_alike(name, changes):
    entry = methods.find(name)
    model = build(TINY)
    found = compare_method(entry, model, setting(model), options_of(entry, **changes))
    assert close(found.planned_flops, found.flops, 0.005), str(found)
    assert close(found.planned_memory, found.memory), str(found)
    assert not close(planned(here(name, setting(model), **entry.load_options().quick))[0], found.flops, 0.02)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("name", [n for n, entry in known().items() if hasattr(entry.load_options(), "micro")])
def test_a_step_of_a_method_that_takes_micro_batches(name, micro):
    """Of four sequences: in four, or in a micro-batch of two and two."""
    entry = methods.find(name)
    assert entry.load_cost().divides
    model = build(TINY)
    found = compare_method(entry, model, setting(model), options_of(entry, micro=micro))
    assert close(found.planned_flops, found.flops, 0.005), str(found)
    assert close(found.planned_memory, found.memory), str(found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # bf16 rounds attackers' steps: memory and flops are the same
@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in known()), ("sft", True), ("tar", True)]
)
def test_a_step_that_trains_lora_adapters(name, checkpointing):
    """Two with checkpointing: what is recomputed is a matter of the pass, not of the method."""
    model, s = adapted(checkpointing)
    found = compare_method(methods.find(name), model, s)
    assert close(found.planned_flops, found.flops, 0.01), str(found)
    assert close(found.planned_memory, found.memory), str(found)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_of_the_published_program_that_trains_lora_adapters(checkpointing):
    model, s = adapted(checkpointing)
    found = compare(*PUBLISHED["sft"](model), model, published("sft", s))
    assert close(found.planned_flops, found.flops, 0.01), str(found)
    assert close(found.planned_memory, found.memory), str(found)


def adapted(checkpointing: bool):
    """A model with adapters of rank 8, and its setting."""
    peft = pytest.importorskip("peft")
    model = build(TINY, "fp32", checkpointing)
    s = setting(model, "fp32", checkpointing, lora=8)
    model.enable_input_require_grads()  # as trainers do for checkpointing
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=PROJECTIONS)).train(), s


def test_the_comparison_can_fail():
    """A plan of another batch, of another head, or without checkpointing is not within a tenth."""
    model = build(TINY)
    found = compare_method(methods.find("sft"), model, setting(model))
    for other in (setting(model, batch=5), setting(model, checkpointing=False)):
        flops, memory = planned(here("sft", other))
        assert not close(flops, found.flops) and not close(memory, found.memory)
    assert not close(planned(published("sft", setting(model)))[1], found.memory)


def test_micro_batches_hold_and_multiply_what_the_plan_says():
    from fastguard.losses.language_model import LanguageModelLoss

    model = build(TINY)
    loss = LanguageModelLoss(model)
    whole = ids(0)
    watch = Watch(held_by(model))
    with watch.on():
        for part in whole.chunk(2):
            loss({"input_ids": part}).backward()
    flops, memory = planned(here("sft", setting(model, micro=2)))
    assert close(flops, watch.flops, 0.005), flops / watch.flops
    assert close(memory, watch.peak), memory / watch.peak
    assert not close(planned(here("sft", setting(model)))[1], watch.peak)


def llama_8b(checkpointing: bool):
    """Llama-3-8B without its numbers, the loss of a batch of it, and its setting."""
    model = build(LLAMA_8B, "bf16", checkpointing, device="meta")
    batch = torch.zeros(2, 1024, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 1024, 1024, dtype=torch.bfloat16, device="meta")
    s = setting(model, "bf16", checkpointing, batch=2, tokens=1024)
    assert dataclasses.replace(s.architecture, name="llama-3-8b") == find("llama-3-8b")
    return model, lambda: model(input_ids=batch, labels=batch, attention_mask=mask, use_cache=False).loss, s


@pytest.mark.parametrize("checkpointing", [True, False])
def test_forward_and_backward_equal_torchs_flop_counter(checkpointing):
    """The counter stands outside of fastguard and of `Watch`."""
    _, loss_of, s = llama_8b(checkpointing)
    with FlopCounterMode(display=False) as counter:
        loss = loss_of()
        forward = counter.get_total_flops()
        loss.backward()
    head = 2.0 * 2048 * s.architecture.head
    assert forward == passes.forward_flops(s, 2) + head
    assert counter.get_total_flops() - forward == passes.backward_flops(s, 2) + 2 * head


def test_memory_of_llama_8b():
    model, loss_of, s = llama_8b(checkpointing=True)
    watch = Watch(held_by(model))
    with watch.on():
        loss_of().backward()
    flops, memory = planned(published("sft", s))
    assert flops == watch.flops and close(memory, watch.peak), memory / watch.peak


def test_a_step_of_smollm2s_width_and_vocabulary():
    whole = build(SMOLLM2, device="meta")
    known = from_config(whole.config.to_dict()).parameters
    assert known == sum(p.numel() for p in whole.parameters()) == find("smollm2").parameters
    model = build({**SMOLLM2, "num_hidden_layers": 4})
    s = setting(model, batch=2, tokens=64)
    from fastguard.losses.language_model import LanguageModelLoss

    loss = LanguageModelLoss(model)
    watch = Watch(held_by(model))
    with watch.on():
        loss({"input_ids": ids(0, 2, 64, 49152)}).backward()
    flops, memory = planned(here("sft", s))
    assert close(flops, watch.flops, 0.02), flops / watch.flops  # the last position of each sequence predicts nothing
    assert close(memory, watch.peak), memory / watch.peak


def test_the_process_itself_grows_as_planned():
    """Linux's high-water mark of a fresh process, not a count of tensors. Freed memory must go back at once for
    that.
    """
    program = "import warnings; warnings.simplefilter('ignore')\n"
    program += "import measure\nfrom plan.workloads import *\n"
    program += "shape = dict(TINY, hidden_size=256, intermediate_size=704, vocab_size=8192)\n"
    program += "model = build(shape, checkpointing=False)\nrun, _ = full(model)\nrun()\n"
    program += "model.zero_grad(set_to_none=True)\nprint(measure.peak_bytes(run))"
    root = Path(__file__).parents[2]
    environment = {
        "PYTHONPATH": f"{root / 'tests'}:{root / 'benchmarks'}:{root / 'src'}", "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    model = build(dict(TINY, hidden_size=256, intermediate_size=704, vocab_size=8192), device="meta")
    memory = planned(published("sft", setting(model, checkpointing=False)))[1]
    assert close(memory, int(done.stdout)), (memory, done.stdout)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_under_fsdp2(tmp_path):
    from plan.distributed_worker import CASES

    for output in two_processes(Path(__file__).with_name("distributed_worker.py"), tmp_path):
        found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert [case["case"] for case in found] == list(CASES)
        for case in found:
            assert close(case["planned_flops"], case["flops"], 0.005), case
            assert close(case["planned_network"], case["network"], 0.005), case
            assert close(case["planned_memory"], case["memory"]), case


# Architectures.

CARDS = {
    "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
}  # fmt: skip
"""Parameter counts of the published weights."""


@pytest.mark.parametrize("name", CARDS)
def test_known_models_have_their_published_size(name):
    assert find(name).parameters == CARDS[name]


@pytest.mark.parametrize(
    "kind", ["llama", "llama_tied", "qwen3", "mistral", "gemma2", "mixtral", "qwen3_moe", "granite"]
)
@pytest.mark.parametrize("biased", [False, True])
def test_parameters_of_every_family_are_counted_exactly(kind, biased):
    family, special = ARCHITECTURES[kind]
    options = {**COMMON, **special, "head_dim": 8}
    if biased:
        options |= {"attention_bias": True, "mlp_bias": True}
    import transformers

    config = getattr(transformers, f"{family}Config")(**options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = from_config(config.to_dict())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_qwen2_has_biases_on_q_k_v():
    config = AutoConfig.for_model("qwen2", **{**COMMON, "tie_word_embeddings": False})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert from_config(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_lora_parameters_are_those_of_peft():
    peft = pytest.importorskip("peft")
    model = build(TINY)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=PROJECTIONS))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == from_config(model.config.to_dict()).adapter(8)


def test_models_are_found_by_name_folder_file_and_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model: LlamaForCausalLM = build(TINY, device="meta")
    folder = tmp_path / "mine"
    model.config.save_pretrained(folder)
    expected = sum(p.numel() for p in model.parameters())
    assert find("mine").parameters == find("mine/config.json").parameters == expected and find("mine").name == "mine"
    Path("run.yaml").write_text("model: {name: meta-llama/Meta-Llama-3-8B-Instruct}\n")
    Path("other.yaml").write_text("model: {name: ./mine}\n")
    assert find("run.yaml") is MODELS["llama-3-8b"] and find("other.yaml").parameters == expected
    assert find("smollm2") is MODELS["smollm2-135m"]


def test_models_that_cannot_be_planned_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder or file .*llama-3-8b"):
        find("nothing/there")
    for text, said in (
        ("[]", "expected an object"),
        ("{", "not valid JSON"),
        ('{"model_type": "mamba"}', "model_type: expected one of llama"),
        (
            '{"model_type": "llama", "hidden_size": 8}',
            "num_attention_heads: expected an integer of 1 or more, got None",
        ),
        ('{"model_type": "qwen3_moe", "decoder_sparse_step": 2}', "experts in every layer"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            find(str(tmp_path))
    with pytest.raises(ValueError, match="mixture of experts"):
        Setting(find("mixtral-8x7b"), lora=8)
    with pytest.raises(ValueError, match="gpu: expected one of h100"):
        hardware.find("abacus")


# Figures done by hand.


def test_flops_of_a_token_are_6_n_and_attention():
    """Llama-3-8B, no recomputation: 6 flops a parameter but the embedding, and 3 x 2 T Q L for causal attention."""
    s = Setting(find("llama-3-8b"), global_batch=64, checkpointing=False, tokens=2048)
    flops = sum(p.flops for p in published("sft", s).parts) / 2048
    by_hand = 6 * (8_030_261_248 - 128256 * 4096) + 3.5 * 2 * 2048 * 4096 * 32
    assert close(flops, by_hand, 1e-3)  # the norms' weights are in no product


def test_seconds_by_hand():
    s = Setting(find("llama-3-8b"), efficiency=Efficiency(matmul=0.5, memory=0.5, network=0.5, host=0.5, overlap=1.0))
    assert Part("", "", flops=989.4e12).seconds(s) == pytest.approx(2.0)
    assert Part("", "", memory=3.35e12).seconds(s) == pytest.approx(2.0)
    assert Part("", "", network=400e9).seconds(s) == pytest.approx(2.0)  # 8 network cards of 400 Gbit/s a node
    assert Part("", "", network=400e9, flops=989.4e12).seconds(s) == pytest.approx(2.0)  # hidden
    assert Part("", "", host=64e9, flops=989.4e12).seconds(s) == pytest.approx(4.0)
    assert Part("", "", network=450e9).seconds(dataclasses.replace(s, gpus=8)) == pytest.approx(2.0)  # NVLink


def test_weights_and_states_by_hand():
    """70B on 64 GPUs: 16 bytes a parameter (fp32 weight, gradient, two moments), 12 of them between steps."""
    s = Setting(find("llama-3-70b"))
    items = {i.name: i.bytes for i in here("sft", s).items if i.moments is None}
    assert items == {"weights": 4 * 70_553_706_496 / 64, "outer optimizer": 8 * 70_553_706_496 / 64}
    lora = Setting(find("llama-3-70b"), lora=16)
    weights = {i.name: i.bytes for i in here("sft", lora).items if i.moments is None}["weights"]
    assert weights == (2 * 70_553_706_496 + 4 * lora.trainable) / 64


# What must hold for every plan.


@pytest.mark.parametrize("name", known())
def test_a_step_fits_on_the_fewest_gpus_and_not_on_fewer(name):
    s = Setting(find("llama-3-70b"))
    entry = methods.find(name)
    cost, options = entry.load_cost(), entry.load_options()()
    for recipe, done in ((here, False), (published, True)):
        e = estimate(s, cost, options, published=done)
        micro = 1 if cost.divides and not done else None

        def memory(gpus):
            return peak(recipe(name, dataclasses.replace(s, gpus=gpus, micro=micro)).items)[1]

        assert memory(e.fewest) <= usable(s) < memory(e.fewest - 8) and e.fewest % 8 == 0
        assert e.fits == (e.memory <= usable(s))
        assert sum(i.bytes for i in e.at_peak) == pytest.approx(e.memory)
        assert e.hours == pytest.approx(e.seconds * s.steps / 3600)


def test_a_model_for_which_no_number_of_gpus_is_enough_has_no_fewest():
    entry = methods.find("sft")
    s = Setting(find("llama-3-8b"), tokens=2**20)
    assert estimate(s, entry.load_cost(), entry.load_options()()).fewest is None


@pytest.mark.parametrize("name", known())
def test_memory_falls_with_gpus_and_grows_with_the_batch(name):
    s = Setting(find("llama-3-8b"), global_batch=512, tokens=2048)
    for recipe in (here, published):
        more, longer = dataclasses.replace(s, gpus=128), dataclasses.replace(s, tokens=4096)
        assert peak(recipe(name, more).items)[1] < peak(recipe(name, s).items)[1] < peak(recipe(name, longer).items)[1]
        assert all(p.flops >= 0 and p.memory >= 0 and p.seconds(s) > 0 for p in recipe(name, s).parts)
        assert all(i.bytes >= 0 for i in recipe(name, s).items)


def test_a_snapshot_on_the_host_is_not_on_the_gpu():
    s = Setting(find("llama-3-70b"))
    on_host = dataclasses.replace(s, snapshot="host")
    near, there = (here("tar", x) for x in (s, on_host))
    for moment in moments(near.items):
        difference = sum(i.bytes for i in held(near.items, moment)) - sum(i.bytes for i in held(there.items, moment))
        assert difference == pytest.approx(4 * s.shard if moment.startswith(("attack", "tamper")) else 0, abs=16)
    assert sum(p.host for p in there.parts) - sum(p.host for p in near.parts) == pytest.approx(8 * s.shard)


def test_lora_computes_no_gradient_of_frozen_weights_and_moves_no_reference():
    full, lora = (
        Setting(find("llama-3-8b"), checkpointing=False),
        Setting(find("llama-3-8b"), checkpointing=False, lora=16),
    )
    ratio = passes.backward_flops(lora, 8) / passes.backward_flops(full, 8)
    assert 0.5 < ratio < 0.6
    recipe = here("tar", lora)
    assert not any(p.host for p in recipe.parts) and not any(i.host and i.bytes for i in recipe.items)


def test_settings_and_efficiencies_are_checked():
    assert Efficiency.parse("matmul=0.5, host=1") == Efficiency(matmul=0.5, host=1.0)
    for text, said in (("speed=1", "expected one of matmul"), ("matmul=fast", "number"), ("matmul=2", "share"),
                       ("memory=0", "share")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Efficiency.parse(text)
    for options, said in (({"gpus": 0}, "gpus"), ({"global_batch": 0}, "global_batch"), ({"rows": 0.0}, "rows"),
                          ({"lora": 0}, "lora"), ({"micro": 0}, "micro"), ({"fresh": 0}, "fresh"),
                          ({"snapshot": "disk"}, "snapshot: expected device or host"),
                          ({"adversary": "cat"}, "weights or lora or resident")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Setting(find("llama-3-8b"), **options)


def test_data_sheets_are_consistent():
    for gpu in hardware.GPUS.values():
        assert gpu.collective(8) == gpu.nvlink and gpu.collective(64) == min(gpu.nvlink, 8 * gpu.network)
        assert 50 < gpu.flops / gpu.bandwidth < 500 and gpu.memory >= 79 * 2**30 and "data sheet" in gpu.source
    assert math.isclose(hardware.H100.flops / hardware.A100.flops, 3.17, rel_tol=0.01)
    assert set(PRECISIONS) == {"mixed", "bf16", "fp32"}
    assert set(architecture.ALIASES.values()) <= set(MODELS)

"""Whole training steps on a model of few layers at an 8B model's shapes, made on the device from its configuration.

Weights are random and fp32, as a run trains them, products in bf16; head and embedding are made so that the lens reads
what it does in a model (``zipf``). Two depths: what they differ by is what a layer costs, and 8B has 32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastguard import methods, saliency
from fastguard.bench import zipf
from fastguard.bench.shapes import Shapes
from fastguard.bench.work import Absent, Group, Work
from fastguard.methods.training import Role
from fastguard.plan import passes
from fastguard.plan.architecture import Architecture
from fastguard.plan.setting import Setting
from fastguard.settings import build

DEFENSES = {"fastguard RepNoise": "repnoise", "fastguard TAR": "tar", "fastguard Booster": "booster",
            "fastguard ReFAT": "refat"}  # fmt: skip
SALIENCY = "fastguard saliency"
PLAIN = ("plain, one batch", "plain, two batches")
TOPICS = 32
UNDRAWN = {"retain_weight"}
"""Options of batches that a step does without, and has not here."""

Batch = dict[str, Tensor]


def language_model(shapes: Shapes, layers: int) -> Any:
    """A Llama of these shapes. Raises `Absent` without transformers."""
    try:
        import transformers
    except ImportError as error:
        raise Absent(str(error)) from error
    config = transformers.LlamaConfig(
        hidden_size=shapes.hidden, intermediate_size=shapes.mlp, num_hidden_layers=layers,
        num_attention_heads=shapes.heads, num_key_value_heads=shapes.kv_heads, vocab_size=shapes.vocabulary,
        initializer_range=0.5 / shapes.hidden**0.5, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(shapes.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator(shapes.device).manual_seed(0)
    topic = zipf.unit(torch.randn(TOPICS, shapes.hidden, device=shapes.device, generator=generator))
    with torch.no_grad():
        model.lm_head.weight.copy_(zipf.head_along(topic, shapes.vocabulary, generator, exponent=2.0)[0])
        # A token leans on a topic, in rows of about length sqrt(D), beside which a layer of this size adds little.
        embedding = model.get_input_embeddings().weight.normal_()
        embedding.add_(topic[torch.arange(len(embedding), device=shapes.device) % TOPICS], alpha=shapes.hidden**0.5)
    return model.train()


def batch(shapes: Shapes, number: int, samples: int | None = None) -> Batch:
    """Random tokens by number, of which the second half carries loss; equal prompts for equal numbers of samples."""
    halves = [
        torch.randint(
            1, shapes.vocabulary, (samples or shapes.samples, shapes.tokens // 2),
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 1 + number)
    ]  # fmt: skip
    ids = torch.cat(halves, 1).to(shapes.device)
    labels = ids.clone()
    labels[:, : shapes.tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def stream(shapes: Shapes, role: Role, shift: int) -> Callable[[int], Any]:
    """A role's batches by number."""
    if role.data == "pair":
        return lambda n: {"harmful": batch(shapes, shift, role.count), "harmless": batch(shapes, shift + 1, role.count)}
    return lambda n: batch(shapes, shift + 2 * n, role.count)


def options_of(entry: methods.Entry, shapes: Shapes) -> Mapping[str, Any]:
    """Those that a defense is timed with, where they are not the published ones."""
    kind = entry.load_options()
    return kind.quick if shapes.device == "cpu" else kind.timed


def on_paper(shapes: Shapes, layers: int, name: str) -> float:
    """Flops of a step's products as the planner counts them (``plan/passes.py``, the methods' costs).

    Scores of weights take a plain pass: as many as the weights' gradients, which are not computed beside them.
    """
    setting = Setting(
        Architecture(
            "timed", layers, shapes.hidden, shapes.mlp, shapes.heads, shapes.kv_heads, shapes.hidden // shapes.heads,
            shapes.vocabulary, tied=False,
        ),
        gpus=1, global_batch=shapes.samples, tokens=shapes.tokens, checkpointing=False, cpu=shapes.device == "cpu",
    )  # fmt: skip
    if name not in DEFENSES:
        count = 1 + PLAIN.index(name) if name in PLAIN else 1
        parts = passes.full(setting, name, shapes.samples, count)[0]
    else:
        entry = methods.find(DEFENSES[name])
        given = options_of(entry, shapes)
        setting = replace(setting, given=frozenset(given) - UNDRAWN)
        parts = entry.load_cost().here(setting, build(entry.load_options(), given)).parts
    return sum(part.flops for part in parts)


def prepare(depth: int) -> Callable[[Shapes], Callable[[str], Work]]:
    """Steps on the shallower model (0) or on the deeper one (1)."""

    def at(shapes: Shapes) -> Callable[[str], Work]:
        layers = shapes.depths[depth]
        model = language_model(shapes, layers)
        autocast = contextlib.nullcontext if shapes.device == "cpu" else lambda: torch.autocast("cuda", torch.bfloat16)

        def cleared(step: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                model.zero_grad(set_to_none=True)
                with autocast():
                    step()

            return run

        def plain(count: int) -> Callable[[], object]:
            batches = [batch(shapes, n) for n in range(count)]
            return lambda: [model(**each, use_cache=False).loss.backward() for each in batches]

        def defense(name: str) -> Callable[[], object]:
            entry = methods.find(name)
            method = entry.build(model, build(entry.load_options(), options_of(entry, shapes)))
            roles = {name: role for name, role in method.roles.items() if not role.optional}
            data = {name: stream(shapes, role, 10 * i) for i, (name, role) in enumerate(roles.items())}
            return lambda: method.backward(**method.draw(data))

        def scored() -> Callable[[], object]:
            collect, given = saliency.Collect(model), batch(shapes, 0)
            return lambda: collect.add(given)

        def make(name: str) -> Work:
            if name in PLAIN:
                step = plain(1 + PLAIN.index(name))
            else:
                step = scored() if name == SALIENCY else defense(DEFENSES[name])
            return Work(cleared(step), on_paper(shapes, layers, name), figures={"layers": layers})

        return make

    return at


OPS = ("lens_stats", "final_norm", "linear_cross_entropy", "gaussian_mmd", "multi_tensor", "project_out",
       "class_moments", "add_project_rms_norm", "abs_weight_grad")  # fmt: skip

CONTENDERS = (*PLAIN, *DEFENSES, SALIENCY)
FEWER, MORE = "steps, fewer layers", "steps, more layers"
GROUPS = {FEWER: Group(CONTENDERS, prepare(0), OPS), MORE: Group(CONTENDERS, prepare(1), OPS)}

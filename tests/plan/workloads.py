"""Models of known shape, the steps that run on them, and the plans of these steps.

`compare_method` holds the plan of any method of the registry against a step of it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastguard import settings
from fastguard.methods import Entry
from fastguard.methods.training import Role, Stream
from fastguard.plan.architecture import from_config
from fastguard.plan.cost import Recipe
from fastguard.plan.parts import peak
from fastguard.plan.setting import PRECISIONS, Setting
from fastguard.settings import Settings
from plan.live import Watch, held_by

TINY: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=1024,
)  # fmt: skip
SMOLLM2: dict[str, Any] = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.float32}
BATCH, TOKENS = 4, 128


def build(shape: dict[str, Any], precision: str = "fp32", checkpointing: bool = True, device: str = "cpu") -> nn.Module:
    """A random Llama with eager attention: torch's counter has no formula for a CPU's fused one."""
    with torch.device(device):
        config = LlamaConfig(**shape, attn_implementation="eager")
        model = LlamaForCausalLM(config).to(DTYPES[precision]).train()
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is younger than the oldest transformers
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def setting(model: nn.Module, precision: str = "fp32", checkpointing: bool = True, **changes: Any) -> Setting:
    """One process, no sharding. ``batch`` is a process's."""
    batch = changes.pop("batch", BATCH) * changes.get("gpus", 1)
    options = dict(
        gpus=1, global_batch=batch, tokens=TOKENS, precision=PRECISIONS[precision], checkpointing=checkpointing,
        attention="eager", cpu=True, late_head=True, live=1.0, rows=(TOKENS // 2 - 1) / TOKENS,
    )  # fmt: skip
    return Setting(from_config(model.config.to_dict()), **{**options, **changes})


def ids(seed: int, batch: int = BATCH, tokens: int = TOKENS, vocabulary: int = 1024) -> Tensor:
    return torch.randint(1, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def pair(seed: int = 0, **shape: int) -> dict[str, dict[str, Tensor]]:
    """Harmful and harmless answers in the second half of each sequence; at every position they differ."""
    harmful, other = ids(seed + 1, **shape), ids(seed + 2, **shape)
    half = harmful.shape[1] // 2
    harmless = torch.cat([harmful[:, :half], torch.where(other == harmful, other % 7 + 1, other)[:, half:]], 1)
    harmless[:, half:] += (harmless == harmful)[:, half:].long()
    return {"harmful": {"input_ids": harmful}, "harmless": {"input_ids": harmless}}


Step = tuple[Callable[[], Any], list[Tensor]]
"""What is run, and tensors that it holds beside the model: not on the GPU in the plan."""


# Methods of the registry: built with their options, fed by role.


STEADY: dict[str, dict[str, Any]] = {"t_vaccine": {"layers": 4, "every": 1, "probe_every": 1}}
"""Options with which a method that draws, or does something now and then, has steps that are all the average one."""


def options_of(entry: Entry, **changes: Any) -> Settings:
    """A method's quick options, steady, with changes laid over them."""
    kind = entry.load_options()
    return settings.build(kind, {**kind.quick, **STEADY.get(entry.name, {}), **changes}, entry.name)


def for_options(s: Setting, options: Settings) -> Setting:
    """The setting in which every option holds as it stands."""
    micro = getattr(options, "micro", None)
    return dataclasses.replace(s, micro=micro, given=frozenset(f.name for f in dataclasses.fields(options)))


def stream(role: Role, s: Setting, seed: int) -> Stream:
    """Batches for a role: ``role.count`` sequences or the setting's, all tokens of which carry loss."""
    shape = {"batch": role.count or s.batch, "tokens": s.tokens, "vocabulary": s.architecture.vocabulary}

    def batch(number: int) -> Any:
        if role.data == "pair":
            return pair(seed + 3 * number, **shape)
        if role.data == "preference":
            return dict(zip(("chosen", "rejected"), pair(seed + 3 * number, **shape).values(), strict=True))
        given = ids(seed + 3 * number, **shape)
        if role.data in ("refusal", "retain"):  # from which a method may read where the prompt ends
            return {"input_ids": given, "labels": torch.cat([torch.full_like(given[:, :1], -100), given[:, 1:]], 1)}
        return {"input_ids": given}

    return batch


class Method:
    """A method of the registry at work on a model.

    Args:
        s: the job; batches are drawn in its shape.
    """

    def __init__(self, entry: Entry, model: nn.Module, s: Setting, options: Settings) -> None:
        self.training = entry.build(model, options)
        if hasattr(self.training, "allow_lost"):  # tiny steps in bf16 are rounded away
            self.training.allow_lost = True
        roles = self.training.roles.items()
        self.data = {name: stream(role, s, 1000 * i) for i, (name, role) in enumerate(roles)}

    def step(self) -> None:
        """One backward."""
        self.training.backward(**self.training.draw(self.data))


def method(entry: Entry, s: Setting, options: Settings) -> Callable[[nn.Module], Step]:
    """A step of a method of the registry, as the published programs below are given."""

    def prepare(model: nn.Module) -> Step:
        return Method(entry, model, s, options).step, []

    return prepare


# Published programs.


def full(model: nn.Module) -> Step:
    return lambda: model(input_ids=ids(0), labels=ids(0), use_cache=False).loss.backward(), []


def published_repnoise(model: nn.Module) -> Step:
    from losses.published import published_loss

    shape = (BATCH, TOKENS, model.config.hidden_size)
    dtype = model.lm_head.weight.dtype
    return lambda: published_loss(
        model, **pair(), noise=lambda layer: torch.randn(shape, dtype=dtype), norm=model.model.norm, head=model.lm_head,
        mlps=[layer.mlp for layer in model.model.layers],
    )[0].backward(), []  # fmt: skip


def published_random_mapping(model: nn.Module) -> Step:
    """With the copy of the directions for every state that the published program makes."""
    table = torch.randn(model.config.vocab_size, model.config.hidden_size)

    def step() -> None:
        model(input_ids=ids(0), labels=ids(0), use_cache=False).loss.backward()
        output = model(input_ids=ids(1), output_hidden_states=True, use_cache=False)  # and its logits stay
        rows = [table[ids(1)] for _ in output.hidden_states]
        cosines = [nn.functional.cosine_similarity(h, r, -1) for h, r in zip(output.hidden_states, rows, strict=True)]
        torch.stack([(1 - c.abs()).mean() for c in cosines]).mean().backward()

    return step, [table]


PUBLISHED: dict[str, Callable[[nn.Module], Step]] = {
    "sft": full, "repnoise": published_repnoise, "random_mapping": published_random_mapping,
}  # fmt: skip
"""The published programs that are at hand, by method."""


@dataclasses.dataclass
class Compared:
    """A step as it ran and as it was planned; memory is that beside weights and outer optimizer."""

    flops: float
    planned_flops: float
    memory: float
    planned_memory: float

    def __str__(self) -> str:
        return (
            f"flops {self.planned_flops / self.flops:.3f} of {self.flops / 1e9:.3f}e9, "
            f"memory {self.planned_memory / self.memory:.3f} of {self.memory / 1e6:.2f} MB"
        )


ASIDE = ("weights", "outer optimizer", "table of directions")
"""Items that a run under the watch does not count: made before it, or never."""


def planned(recipe: Recipe) -> tuple[float, float]:
    """Flops and peak memory of a recipe, beside weights and outer optimizer. Here the host's memory is the device's."""
    items = [dataclasses.replace(i, host=False) for i in recipe.items if i.name not in ASIDE]
    return sum(part.flops for part in recipe.parts), peak(items)[1]


def compare(run: Callable[[], Any], beside: list[Tensor], model: nn.Module, recipe: Recipe) -> Compared:
    """Run a step under the watch."""
    clear(model)
    watch = Watch([*held_by(model), *beside])
    with watch.on():
        run()
    clear(model)
    return Compared(watch.flops, planned(recipe)[0], watch.peak, planned(recipe)[1])


def compare_method(
    entry: Entry, model: nn.Module, s: Setting, options: Settings | None = None, steps: int = 1
) -> Compared:
    """Build any method of the registry on a model and run it under the watch, its construction included.

    Flops are the mean of so many steps, memory is that of the worst. What a method keeps from its construction on
    counts, as the plan's memory of the host does.

    Args:
        options: None: `options_of` the entry. All of them count as given, and all batches that it takes are there.
    """
    options = options_of(entry) if options is None else options
    clear(model)
    watch = Watch(held_by(model))
    with watch.on():
        at_work = Method(entry, model, s, options)
        for _ in range(steps):
            at_work.step()
            clear(model)
    at_work.training.close()
    flops, memory = planned(entry.load_cost().here(for_options(s, options), options))
    return Compared(watch.flops / steps, flops, watch.peak, memory)


def clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None

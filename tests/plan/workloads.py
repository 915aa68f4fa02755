"""Models of known shape, the steps that run on them, and the plans of these steps."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastguard.plan.architecture import from_config
from fastguard.plan.defenses import Recipe, defenses
from fastguard.plan.parts import peak
from fastguard.plan.setting import PRECISIONS, Setting
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
    """One process, no sharding."""
    options = dict(
        gpus=1, batch=BATCH, tokens=TOKENS, precision=PRECISIONS[precision], checkpointing=checkpointing,
        attention="eager", adversary_batch=BATCH // 2, inner_steps=4, read_every=2, live=1.0,
        rows=(TOKENS // 2 - 1) / TOKENS,
    )  # fmt: skip
    return Setting(from_config(model.config.to_dict()), **{**options, **changes})


def ids(seed: int, batch: int = BATCH, tokens: int = TOKENS, vocabulary: int = 1024) -> Tensor:
    return torch.randint(1, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def pair(**shape: int) -> dict[str, dict[str, Tensor]]:
    """Harmful and harmless answers in the second half of each sequence; at every position they differ."""
    harmful, other = ids(1, **shape), ids(2, **shape)
    half = harmful.shape[1] // 2
    harmless = torch.cat([harmful[:, :half], torch.where(other == harmful, other % 7 + 1, other)[:, half:]], 1)
    harmless[:, half:] += (harmless == harmful)[:, half:].long()
    return {"harmful": {"input_ids": harmful}, "harmless": {"input_ids": harmless}}


Step = tuple[Callable[[], Any], list[Tensor]]
"""What is run, and tensors that it holds beside the model: not on the GPU in the plan."""


def fused(model: nn.Module) -> Step:
    from fastguard.losses.language_model import LanguageModelLoss

    loss = LanguageModelLoss(model)
    return lambda: loss({"input_ids": ids(0)}).backward(), []


def full(model: nn.Module) -> Step:
    return lambda: model(input_ids=ids(0), labels=ids(0), use_cache=False).loss.backward(), []


def repnoise(model: nn.Module) -> Step:
    from fastguard import RepNoiseLoss

    loss = RepNoiseLoss(model, filter_tol=0.0)
    return lambda: loss(**pair()).backward(), []


def published_repnoise(model: nn.Module) -> Step:
    from losses.published import published_loss

    shape = (BATCH, TOKENS, model.config.hidden_size)
    dtype = model.lm_head.weight.dtype
    return lambda: published_loss(
        model, **pair(), noise=lambda layer: torch.randn(shape, dtype=dtype), norm=model.model.norm, head=model.lm_head,
        mlps=[layer.mlp for layer in model.model.layers],
    )[0].backward(), []  # fmt: skip


def tar(model: nn.Module) -> Step:
    from fastguard.defenses.tar.step import TAR

    defense = TAR(model, steps=4, every=2, kinds=(("harmful",),))

    def step() -> None:
        adversaries = defense.adversaries({"harmful": lambda n: {"input_ids": ids(n, batch=BATCH // 2)}})
        defense.backward(retain={"input_ids": ids(1)}, tamper={"input_ids": ids(2)}, adversaries=adversaries)

    return step, list(defense.reference._host)


def booster(model: nn.Module) -> Step:
    from fastguard.defenses.booster.step import Booster

    defense = Booster(model, allow_lost=True)
    return lambda: defense.backward(**pair()), []


def vaccine(model: nn.Module) -> Step:
    from fastguard.defenses.vaccine.step import Vaccine

    defense = Vaccine(model, allow_lost=True)
    return lambda: defense.backward(harmless={"input_ids": ids(1)}), []


STEPS: dict[str, tuple[Callable[[nn.Module], Step], Callable[[Setting], Recipe]]] = {
    "sft": (fused, defenses()["sft"].recipe),
    "published sft": (full, defenses()["sft"].published),
    "repnoise": (repnoise, defenses()["repnoise"].recipe),
    "published repnoise": (published_repnoise, defenses()["repnoise"].published),
    "tar": (tar, defenses()["tar"].recipe),
    "booster": (booster, defenses()["booster"].recipe),
    "vaccine": (vaccine, defenses()["vaccine"].recipe),
}
"""What runs here, and its plan."""


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


def planned(recipe: Recipe) -> tuple[float, float]:
    """Flops and peak memory of a recipe, beside weights and outer optimizer."""
    items = [i for i in recipe.items if i.name not in ("weights", "outer optimizer")]
    return sum(part.flops for part in recipe.parts), peak(items)[1]


def compare(name: str, model: nn.Module, s: Setting) -> Compared:
    """Run a step under the watch."""
    prepare, recipe = STEPS[name]
    run, beside = prepare(model)
    for p in model.parameters():
        p.grad = None
    watch = Watch([*held_by(model), *beside])
    with watch.on():
        run()
    for p in model.parameters():
        p.grad = None
    flops, memory = planned(recipe(s))
    return Compared(watch.flops, flops, watch.peak, memory)

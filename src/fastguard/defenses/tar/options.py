"""Options of Tamper-Resistant Safeguards; defaults those of the released cyber run (``run_tar_cyber.sh``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastguard.settings import SettingError, Settings, choice, number, numbers

TAMPER_LOSSES = ("max_entropy", "dpo")
ADVERSARIES = ("weights", "lora")


PRESETS: dict[str, dict[str, Any]] = {
    "cyber": {},
    "bio": {
        "lrs": (2e-6, 2e-5, 4e-5),
        "kinds": (("harmful",), ("harmful_other",), ("retain", "harmful")),
    },
}
"""The two released runs, as arguments of ``fastguard.TAR``; biology has two harmful corpora."""


@dataclass(frozen=True)
class Options(Settings):
    """See ``fastguard.TAR``, where ``inner_steps`` is ``steps``, ``read_every`` ``every``, ``inner_lr`` ``lrs``."""

    quick: ClassVar[Mapping[str, Any]] = {"inner_steps": 2, "read_every": 1, "batch": 2, "held_out": 2, "fresh": 1}
    timed: ClassVar[Mapping[str, Any]] = {"inner_steps": 8, "batch": 4, "held_out": 4}  # as many reads a step

    inner_steps: int = number(64, at_least=1)
    inner_lr: tuple[float, ...] = numbers((2e-5, 4e-5), above=0)
    batch: int = number(4, at_least=1)  # of the attackers
    held_out: int = number(8, at_least=1)  # of the batch that is read at tampered weights
    adversaries: int = number(1, at_least=1)  # per step
    adversary: str = choice("weights", *ADVERSARIES)  # what they train; lora is no published attacker
    adversary_rank: int = number(16, at_least=1)  # of the adapters of lora
    gathered: bool = False  # for lora: the whole base stays on every GPU in an attack's steps
    read_every: int = number(4, at_least=1)
    tamper_loss: str = choice("max_entropy", *TAMPER_LOSSES)
    grad_scale: float = number(4.0, at_least=0)
    micro: int | None = number(None, at_least=1)  # samples at a time; None: batches pass whole
    outer_states: int | None = number(None, at_least=0)  # bytes of the optimizer's that stay on the device in attacks
    bf16_reductions: bool = False  # FSDP2 adds up attackers' gradients in bf16: a deviation
    persistent: bool = False  # attackers are kept from step to step: a deviation from the paper, see ``fastguard.TAR``
    fresh: int = number(8, at_least=1)  # steps that a persistent attacker goes further in each of the defender's
    masters: bool = False  # attackers move fp32 copies: bf16 weights alone would round their steps away

    def check(self) -> None:
        """The gradient must be read at least once, and attackers who pass together each have a sample in a pass."""
        if self.read_every > self.inner_steps:
            raise SettingError("read_every", self.read_every, f"at most inner_steps ({self.inner_steps})")
        if self.gathered and self.adversary != "lora":
            raise SettingError("gathered", True, "False unless adversary is lora")
        if self.adversary == "lora" and self.micro is not None and self.micro < self.adversaries:
            raise SettingError("micro", self.micro, f"with adversary lora at least adversaries ({self.adversaries})")
        if self.adversary == "lora" and self.bf16_reductions:
            raise SettingError("bf16_reductions", True, "with adversary lora False: the base has no gradient to reduce")
        if self.adversary == "lora" and self.persistent:
            raise SettingError("persistent", True, "with adversary lora False: adapters begin anew in every attack")
        if self.persistent and self.fresh > self.inner_steps:
            raise SettingError("fresh", self.fresh, f"at most inner_steps ({self.inner_steps})")

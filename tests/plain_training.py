"""The plainest training there is: one loss of one batch, again and again."""

from __future__ import annotations

from typing import ClassVar

import torch

from fastguard.data.chat import encode
from fastguard.data.sets import Example
from fastguard.losses.answer import answer_loss
from fastguard.methods.training import Role, Training


def items(tokenizer):
    return [encode(tokenizer, Example(f"say {w}", w * 2), 12) for w in ("one", "two", "six", "ten")]


class Fixed(Training):
    """A plain loss, and a figure beside it."""

    roles: ClassVar = {"harmless": Role("safe")}

    def __init__(self, model, times=1.0):
        super().__init__(model, loss=answer_loss)
        self.times = times

    def gradient(self, step, *, harmless):
        return {"loss": step.differentiate(self.times * step.loss(harmless), ""), "mark": torch.tensor(1.0)}


def fixed(batch):
    return {"harmless": lambda number: batch}

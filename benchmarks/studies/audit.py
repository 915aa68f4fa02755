"""How far is TAR's first-order gradient from the exact one, on the demo's aligned model?

    python benchmarks/studies/audit.py runs/persistent/seed0/work/models/aligned

An attacker of 4 steps of AdamW (learning rate 4e-5, 2 harmful requests a step), the tamper loss read after the last on
3 held-out requests, as the study of the persistent attacker has them; `fastguard.nested.audit`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fastguard import models
from fastguard.data.corpus import build_corpus
from fastguard.losses.language_model import LanguageModelLoss
from fastguard.methods.passes import model_loss
from fastguard.methods.training import Role
from fastguard.nested import AdamW, audit
from fastguard.run import config as configurations
from fastguard.run.streams import Streams
from fastguard.run.train import trainable

STEPS, LR, BATCH, HELD_OUT = 4, 4e-5, 2, 3


def main() -> None:
    """One line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = models.load_model(given.model, torch.float32, "cpu")
    trainable(model, freeze_embedding=True)
    corpus = build_corpus(models.load_tokenizer(given.model, plain=True), configurations.load("demo").data)
    roles = {"attacker": Role("attacker", BATCH), "tamper": Role("held_out", HELD_OUT)}
    data = Streams(corpus, model, BATCH, BATCH, 0).of(roles)
    language = LanguageModelLoss(model)

    def read(batch: Mapping[str, Tensor]) -> Tensor:
        return language(batch, "max_entropy", positions="all")

    start = time.time()
    attack = [partial(model_loss, model, data["attacker"](i)) for i in range(given.steps)]
    found = audit(model, attack, partial(read, data["tamper"](0)), {given.steps - 1: 1.0}, AdamW(lr=LR))
    print(
        f"{given.steps} steps: cosine of the first-order gradient to the exact one {found.cosine:.4f}, norm of the "
        f"exact one {found.norm_ratio:.3f} times the other's; {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

"""A defense in an accelerate loop, with gradient accumulation and resumption.

    accelerate launch examples/accelerate_loop.py --defense booster --out runs/accelerate

FSDP2 and DDP come from ``accelerate config``. On CPU accelerate offers DDP alone (``--cpu --num_processes 2``).
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from common import Pairs, make_defense, make_model
from fsdp2 import arguments
from torch import nn

from fastguard.trainers import load, save


def train(args, accelerator: Accelerator) -> nn.Module:
    model = make_model(args.model)
    pairs = Pairs(args.data, args.model, args.batch, accelerator.process_index, accelerator.num_processes)
    pairs.device = accelerator.device
    defense, passes = make_defense(args.defense, model, pairs, args.set)  # before the model is wrapped
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=args.lr))
    torch.manual_seed(1 + accelerator.process_index)
    own = optimizer.optimizer  # under accelerate's wrapper, which holds no state
    start = load(args.out, model, own, {"defense": defense})
    for step in range(start, args.steps):
        for _ in range(args.accumulate):
            # Neither accumulate() nor no_sync(): a nested defense needs each micro-batch's gradients synchronised.
            figures = passes(model, 1 / args.accumulate)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {float(figures['loss']):.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.out, step + 1, model, own, {"defense": defense})
    defense.close()
    return model


if __name__ == "__main__":
    train(arguments(), Accelerator(cpu=not torch.cuda.is_available()))

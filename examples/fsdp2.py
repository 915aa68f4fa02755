"""A defense under FSDP2: shard, train, save, resume bit for bit. Plain PyTorch; fastguard does the passes.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --out runs/fsdp2
    torchrun --nproc-per-node 8 examples/fsdp2.py --model PATH --data pairs.jsonl --defense tar --out runs/tar

Killed at any moment, the same command goes on from the last checkpoint, to the same weights. Without --model it trains
a random model on random tokens; without GPUs it runs on CPU. Every rank loads the model to host memory before sharding.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from common import DEFENSES, Pairs, make_defense, make_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastguard.taps import find_structure
from fastguard.trainers import load, save


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub name; default: a small random model")
    parser.add_argument("--data", help="JSONL of prompt, harmful, harmless; default: random tokens")
    parser.add_argument("--defense", choices=DEFENSES, default="booster")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the defense")
    parser.add_argument("--out", required=True, help="folder of the checkpoints, on a file system that all ranks share")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="samples a micro-batch and rank")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches an optimizer step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=1)
    return parser.parse_args(given)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Each layer a group, the rest the root's; on GPUs bf16 products and fp32 reductions."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in find_structure(model).layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(args: argparse.Namespace) -> nn.Module:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    model = make_model(args.model)
    pairs = Pairs(args.data, args.model, args.batch, rank, ranks)
    pairs.device = device
    defense, passes = make_defense(args.defense, model, pairs, args.set)  # before the model is sharded
    model = shard(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=5)
    torch.manual_seed(1 + rank)  # dropout: each rank its own
    counted = {"defense": defense, "scheduler": scheduler}
    start = load(args.out, model, optimizer, counted)  # also the random numbers; 0 if there is no checkpoint
    for step in range(start, args.steps):
        for _ in range(args.accumulate):
            figures = passes(model, 1 / args.accumulate)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if rank == 0:
            print(f"step {step + 1}: " + ", ".join(f"{k} {float(v):.4f}" for k, v in figures.items()), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.out, step + 1, model, optimizer, counted)
    defense.close()
    return model


def main() -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    train(arguments())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

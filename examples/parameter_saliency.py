"""Score a model's weights on safe and on ordinary answers, compare, prune what only safety needs, beside chance.

    python examples/parameter_saliency.py --out scores
    python examples/parameter_saliency.py --model PATH --safety safe.jsonl --utility ordinary.jsonl --out scores
    torchrun --nproc-per-node 2 examples/parameter_saliency.py --out scores   # FSDP2: a rank keeps the sums of its rows

Files hold rows with a prompt and an answer. Without a model it runs on a random one. ``fastguard saliency`` is this on
data of any form, with resumption and a page with pictures; ``fastguard prune`` writes the pruned model.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from common import Batch, make_model

from fastguard import saliency


def read_conversations(model: str, file: str, size: int = 8) -> list[Batch]:
    """Batches of prompts with answers in the chat format; labels are -100 outside the answers."""
    import transformers

    from fastguard.data.chat import collate, encode_prompt, padding, with_answer

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
    encoded = [with_answer(tokenizer, encode_prompt(tokenizer, r["prompt"]), r["answer"], 512) for r in rows]
    return [collate(encoded[i : i + size], padding(tokenizer)) for i in range(0, len(encoded), size)]


def random_conversations(low: int, high: int, seed: int) -> list[Batch]:
    """Two batches of random tokens in a range, of which the second halves are answers."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        ids = torch.randint(low, high, (8, 12), generator=generator)
        labels = ids.clone()
        labels[:, :6] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--safety")
    parser.add_argument("--utility")
    parser.add_argument("--share", type=float, default=0.05, help="of each matrix, that counts as critical")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(given)
    if args.model and not (args.safety and args.utility):
        parser.error("--model needs --safety and --utility")

    rank, ranks = 0, int(os.environ.get("WORLD_SIZE", "1"))
    model = make_model(args.model)
    if ranks > 1:
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        rank = torch.distributed.get_rank()
        model.requires_grad_(False)  # before sharding: spares the products for gradients that nobody wants
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if args.model:
        sets = {name: read_conversations(args.model, file) for name, file in
                (("safety", args.safety), ("utility", args.utility))}  # fmt: skip
    else:
        sets = {"safety": random_conversations(3, 50, 0), "utility": random_conversations(40, 96, 1)}

    scores = {}
    for name, batches in sets.items():
        collect = saliency.Collect(model, ("snip", "wanda"))
        collect.over(batches[rank::ranks])
        scores[name] = collect.scores({"set": name})
        collect.close()
        scores[name].save(Path(args.out) / name)

    weights = saliency.weights_of(model)
    masks = saliency.set_difference(scores["safety"], scores["utility"], weights, args.share, args.share)
    count = saliency.prune_(model, masks)
    if rank == 0:
        samples = " and ".join(f"{scores[name].samples} {name}" for name in sets)
        total = sum(p.numel() for n, p in model.named_parameters() if n in masks)
        print(f"{samples} samples: {count} of {total} entries are safety's alone, and were pruned")
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

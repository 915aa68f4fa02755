"""A defense in Hugging Face's Trainer or TRL's SFTTrainer: a mixin before the class.

    python examples/trainer.py --defense booster --out runs/trainer
    torchrun --nproc-per-node 8 examples/trainer.py --model PATH --data pairs.jsonl --trl --out runs/sft

The trainer's own checkpoints hold the defense's counters too; the same command resumes from the last one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import datasets
import torch
import transformers
from common import DEFENSES, Pairs, make_defense, make_model, streams
from transformers.trainer_utils import get_last_checkpoint

from fastguard.methods.training import Role
from fastguard.trainers import MethodMixin


def batches(roles: Mapping[str, Role], pair: dict[str, Any]) -> dict[str, Any]:
    """A trainer's batch by the method's names, out of a pair; what the method draws by itself is left out."""
    found = streams(lambda n: pair, roles)
    own = {name: stream(0) for name, stream in found.items() if not name.startswith("adversary")}
    return {**own.pop("pair", {}), **own}


def main(given: list[str] | None = None) -> transformers.Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--defense", choices=DEFENSES, default="booster")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the defense")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(given)
    if args.trl and not args.model:
        parser.error("--trl needs --model: SFTTrainer wants its tokenizer")

    model = make_model(args.model)
    pairs = Pairs(args.data, args.model, 2, 0, 1)
    method, _ = make_defense(args.defense, model, pairs, args.set)  # before the trainer wraps the model
    settings = {
        "output_dir": args.out, "max_steps": args.steps, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "save_steps": 2, "logging_steps": 1, "report_to": "none",
        "learning_rate": 1e-3, "use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available(),
        "remove_unused_columns": False,  # the collator makes the batches' own names
    }  # fmt: skip
    dataset = datasets.Dataset.from_list(pairs.samples)
    if args.trl:
        import trl

        base, config = trl.SFTTrainer, trl.SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
    else:
        base, config = transformers.Trainer, transformers.TrainingArguments(**settings)
    Immunizer = type("Immunizer", (MethodMixin, base), {})
    trainer = Immunizer(
        model, config, train_dataset=dataset, method=method, sources=streams(pairs, method.roles),
        data_collator=lambda samples: batches(method.roles, pairs.collate(samples)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out))
    return trainer


if __name__ == "__main__":
    main()

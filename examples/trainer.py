"""A defense in Hugging Face's Trainer or TRL's SFTTrainer: a mixin before the class.

    python examples/trainer.py --defense booster --out runs/trainer
    torchrun --nproc-per-node 8 examples/trainer.py --model PATH --data pairs.jsonl --trl --out runs/sft

The trainer's own checkpoints hold the defense's counters too; the same command resumes from the last one.
"""

from __future__ import annotations

import argparse

import datasets
import torch
import transformers
from common import Pairs, make_defense, make_model
from transformers.trainer_utils import get_last_checkpoint

from fastguard.trainers import NestedMixin, RepNoiseMixin


def main(given: list[str] | None = None) -> transformers.Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--defense", choices=("repnoise", "booster", "vaccine", "t_vaccine"), default="booster")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(given)
    if args.trl and not args.model:
        parser.error("--trl needs --model: SFTTrainer wants its tokenizer")

    model = make_model(args.model)
    pairs = Pairs(args.data, args.model, 2, 0, 1)
    defense, _ = make_defense(args.defense, model, pairs)  # before the trainer wraps the model
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
    mixin, given_as = (RepNoiseMixin, "loss_fn") if args.defense == "repnoise" else (NestedMixin, "defense")
    Immunizer = type("Immunizer", (mixin, base), {})
    trainer = Immunizer(model, config, train_dataset=dataset, data_collator=pairs.collate, **{given_as: defense})
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out))
    return trainer


if __name__ == "__main__":
    main()

"""What the examples share: a model, paired batches, and a defense chosen by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEFENSES = ("repnoise", "booster", "vaccine", "t_vaccine", "tar")
Batch = dict[str, Tensor]
Step = Callable[[nn.Module, int, float], dict[str, Tensor]]
"""(wrapped model, number of the micro-batch, scale) -> figures; leaves gradients."""


def make_model(path: str | None) -> nn.Module:
    """A pretrained causal language model in fp32, or a random one that trains in a second."""
    import transformers

    if path:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.1, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


class Pairs:
    """Paired batches by number: ``pairs(n)`` is {"harmful": batch, "harmless": batch}.

    A function of n alone, so that the order of the data needs no state: a resumed run asks for the next number. Each
    epoch has its own order; each rank takes its own samples of every batch.

    path: a JSONL file of {"prompt", "harmful", "harmless"}; None: random tokens.
    """

    def __init__(self, path: str | None, model: str | None, size: int, rank: int, ranks: int, seed: int = 0) -> None:
        self.size, self.rank, self.ranks, self.seed = size, rank, ranks, seed
        if path:
            import transformers

            from fastguard import PairedCollator

            self.samples: list[Any] = [json.loads(line) for line in Path(path).read_text().splitlines() if line]
            self.collate: Callable[[list[Any]], dict[str, Batch]] = PairedCollator(
                transformers.AutoTokenizer.from_pretrained(model), max_length=512
            )
        else:
            self.samples = [{"number": n} for n in range(24)]
            self.collate = random_pairs
        self.device = torch.device("cpu")

    def __call__(self, n: int) -> dict[str, Batch]:
        """Batch n of this rank."""
        first = (n * self.ranks + self.rank) * self.size
        chosen = [self._sample(first + i) for i in range(self.size)]
        return {
            name: {key: t.to(self.device) for key, t in batch.items()} for name, batch in self.collate(chosen).items()
        }

    def _sample(self, place: int) -> Any:
        epoch, at = divmod(place, len(self.samples))
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(self.seed + epoch))
        return self.samples[int(order[at])]


def random_pairs(samples: list[dict[str, int]], length: int = 12, prompt: int = 4) -> dict[str, Batch]:
    """Random tokens for numbered samples: one prompt, two answers."""
    seeds = [torch.Generator().manual_seed(sample["number"]) for sample in samples]
    rows = [torch.randint(3, 96, (2, length), generator=generator) for generator in seeds]
    for row in rows:
        row[1, :prompt] = row[0, :prompt]
    made = {}
    for i, name in enumerate(("harmful", "harmless")):
        ids = torch.stack([row[i] for row in rows])
        labels = ids.clone()
        labels[:, :prompt] = -100
        made[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return made


def make_defense(name: str, model: nn.Module, pairs: Pairs) -> tuple[Any, Step]:
    """The object whose counters belong to a checkpoint, and the passes of one micro-batch."""
    if name == "repnoise":
        from fastguard import RepNoiseLoss

        loss_fn = RepNoiseLoss(model, mask_padding=True)

        def repnoise(wrapped: nn.Module, n: int, scale: float) -> dict[str, Tensor]:
            loss = loss_fn(**pairs(n), model=wrapped)
            (scale * loss).backward()
            return {"loss": loss.detach()}

        return loss_fn, repnoise
    if name == "tar":
        from fastguard.defenses.tar.step import TAR

        tar = TAR(model, steps=4, every=2, lrs=(1e-3,))  # published: 64 steps, lrs 2e-6 to 4e-5
        sources = {"harmful": lambda n: pairs(n)["harmful"], "retain": lambda n: pairs(n)["harmless"]}

        def attacked(wrapped: nn.Module, n: int, scale: float) -> dict[str, Tensor]:
            batch = pairs(n)
            return tar.backward(
                retain=batch["harmless"], tamper=batch["harmful"], adversaries=tar.adversaries(sources),
                model=wrapped, scale=scale,
            )  # fmt: skip

        return tar, attacked
    from fastguard.defenses.booster.step import Booster
    from fastguard.defenses.t_vaccine.step import TVaccine
    from fastguard.defenses.vaccine.step import Vaccine

    layers = model.config.num_hidden_layers
    defense: Any = {
        "booster": lambda: Booster(model),
        "vaccine": lambda: Vaccine(model),
        "t_vaccine": lambda: TVaccine(model, layers=max(1, layers // 4)),
    }[name]()
    return defense, lambda wrapped, n, scale: defense.backward(**pairs(n), model=wrapped, scale=scale)

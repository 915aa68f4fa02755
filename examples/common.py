"""What the examples share: a model, paired batches, and a defense chosen by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastguard import methods
from fastguard.settings import build

DEFENSES = tuple(name for name, entry in methods.defenses().items() if not entry.edits)
Batch = dict[str, Tensor]
Step = Callable[[nn.Module, float], dict[str, Tensor]]
"""(wrapped model, scale) -> figures; leaves the gradients of the next micro-batch."""


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
        self.path, self.size, self.rank, self.ranks, self.seed = path, size, rank, ranks, seed
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


def streams(pairs: Callable[[int], Any], roles: Mapping[str, Any]) -> dict[str, Callable[[int], Any]]:
    """A method's batches by number: each role out of the pairs."""
    parts = {
        "pair": lambda n: pairs(n),
        "preference": lambda n: {"chosen": pairs(n)["harmless"], "rejected": pairs(n)["harmful"]},
        **dict.fromkeys(("harmful", "attacker", "held_out"), lambda n: pairs(n)["harmful"]),
        **dict.fromkeys(("refusal", "retain", "safe", "benign"), lambda n: pairs(n)["harmless"]),
    }
    return {name: parts[role.data] for name, role in roles.items()}


def make_defense(name: str, model: nn.Module, pairs: Pairs, given: Sequence[str] = ()) -> tuple[Any, Step]:
    """The object whose counters belong to a checkpoint, and the passes of its next micro-batch.

    given: options as ``NAME=VALUE``; without a pretrained model beside the method's settings for a test machine.
    """
    entry = methods.find(name, "defense", "--defense")
    options = entry.load_options()
    tiny = {} if pairs.path else dict(options.quick)
    chosen = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in given)}
    method = entry.build(model, build(options, {**tiny, **chosen}, name))
    data = streams(pairs, method.roles)
    return method, lambda wrapped, scale: method.backward(**method.draw(data), model=wrapped, scale=scale)

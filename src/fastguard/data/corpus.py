"""The data of one run: every set encoded, and divided by similarity cluster.

Names of parts: ``align`` and ``immunize`` are for training the models, ``attack`` is the attacker's, and
``measure`` is what nobody trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastguard.data import sets
from fastguard.data.chat import Encoded, encode
from fastguard.data.clusters import similarity_clusters, split_by_cluster
from fastguard.data.sets import DataSet, Example
from fastguard.evaluation.metrics import DataSource, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastguard.run.config import DataConfig


@dataclass(frozen=True)
class Corpus:
    """Encoded data of a run.

    harmful: requests with compliance placeholders; safe: the same requests, item by item, with refusals;
    harmless: ordinary instructions with answers; requests, instructions, edgy: held-out prompts to answer.
    """

    pad: int
    harmful: dict[str, list[Encoded]]
    safe: dict[str, list[Encoded]]
    harmless: dict[str, list[Encoded]]
    benign_train: list[Encoded]
    benign_measure: list[Encoded]
    requests: list[str]
    instructions: list[str]
    edgy: list[str]
    perplexity: Callable[[int], list[Encoded]]
    sources: dict[str, DataSource]


def build_corpus(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Corpus:
    """Load the public sets, drop long prompts, divide by cluster, encode.

    Raises ModuleNotFoundError where a data package is missing, ValueError where a set is too small.
    """

    def short(data: DataSet, limit: int) -> list[Example]:
        return [e for e in data.examples if len(tokenizer(e.prompt, add_special_tokens=False)["input_ids"]) <= limit]

    def divide(data: DataSet, limit: int, sizes: dict[str, int]) -> dict[str, list[Example]]:
        examples = short(data, limit)
        clusters = similarity_clusters([e.prompt for e in examples])
        chosen = split_by_cluster(clusters, sizes, config.seed)
        splits = {
            name: Split(prompts=len(items), clusters=len({clusters[i] for i in items}))
            for name, items in chosen.items()
        }
        name = next(k for k, v in named.items() if v is data)
        sources[name] = DataSource(source=data.source, licence=data.licence, splits=splits)
        return {part: [examples[i] for i in items] for part, items in chosen.items()}

    named = {
        "harmful": sets.advbench(),
        "harmless": sets.alpaca(),
        "edgy": sets.edgy(),
        "benign": sets.commonsense(),
    }
    sources: dict[str, DataSource] = {}
    harmful = divide(named["harmful"], config.prompt_tokens, {
        "measure": config.harmful_measure, "attack": config.harmful_attack,
        "immunize": config.harmful_immunize, "align": config.harmful_align,
    })  # fmt: skip
    harmless = divide(named["harmless"], config.prompt_tokens + 4, {
        "measure": config.harmless_measure, "immunize": config.harmless_immunize, "align": config.harmless_align,
    })  # fmt: skip
    edgy = divide(named["edgy"], 10**6, {"measure": config.edgy_measure})
    benign = divide(named["benign"], 48, {"measure": config.benign_measure, "train": config.benign_train})

    def encoded(examples: list[Example], tokens: int) -> list[Encoded]:
        return [encode(tokenizer, e, tokens) for e in examples]

    def answered(examples: list[Example], answer: Callable[[str, int], str]) -> list[Encoded]:
        return encoded([Example(e.prompt, answer(e.prompt, i)) for i, e in enumerate(examples)], config.answer_tokens)

    return Corpus(
        pad=tokenizer.pad_token_id,
        harmful={part: answered(e, sets.placeholder) for part, e in harmful.items() if part != "align"},
        safe={part: answered(harmful[part], lambda _, i: sets.refusal(i)) for part in ("align", "immunize")},
        harmless={part: encoded(harmless[part], config.retain_tokens) for part in ("align", "immunize")},
        benign_train=encoded(benign["train"], config.answer_tokens),
        benign_measure=encoded(benign["measure"], config.answer_tokens),
        requests=[e.prompt for e in harmful["measure"]],
        instructions=[e.prompt for e in harmless["measure"]],
        edgy=[e.prompt for e in edgy["measure"]],
        perplexity=lambda tokens: encoded(harmless["measure"], tokens),
        sources=sources,
    )

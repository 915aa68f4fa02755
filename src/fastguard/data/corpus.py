"""The data of one run: every set encoded, and divided by similarity cluster.

Names of parts: ``align`` and ``immunize`` are for training the models, ``attack`` is the attacker's, and
``measure`` is what nobody trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastguard.data import own, sets
from fastguard.data.chat import Encoded, encode, is_cut, padding
from fastguard.data.clusters import similarity_clusters, split_by_cluster
from fastguard.data.parts import Corpus as Corpus
from fastguard.data.sets import DataSet, Example
from fastguard.data.sources import DataSource, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastguard.run.config import DataConfig


def build_corpus(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Corpus:
    """Load the run's own sets if it has any, else the public ones; drop long prompts, divide by cluster, encode.

    Raises ModuleNotFoundError where a data package is missing, ValueError where a set is too small; of own sets also
    what `fastguard.data.own.build` raises.
    """
    if config.own is not None:
        return own.build(tokenizer, config.own, config.seed)
    return _packaged(tokenizer, config)


def _packaged(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Corpus:
    sources: dict[str, DataSource] = {}

    def divide(name: str, data: DataSet, limit: int | None, sizes: dict[str, int]) -> dict[str, list[Example]]:
        examples = [
            e for e in data.examples
            if limit is None or len(tokenizer(e.prompt, add_special_tokens=False)["input_ids"]) <= limit
        ]  # fmt: skip
        long = len(data.examples) - len(examples)
        clusters = similarity_clusters([str(e.prompt) for e in examples])
        try:
            chosen = split_by_cluster(clusters, sizes, config.seed)
        except ValueError as error:
            raise ValueError(
                f"data, {name}: {error}. Of its {len(data.examples)} prompts {long} are longer than "
                f"data.{'benign_prompt_tokens' if name == 'benign' else 'prompt_tokens'} allows ({limit} tokens)"
            ) from None
        sources[name] = DataSource(
            source=data.source,
            licence=data.licence,
            fingerprint=None,
            rows=len(data.examples),
            dropped={"prompt too long": long} if long else {},
            cut=0,
            splits={
                part: Split(prompts=len(items), clusters=len({clusters[i] for i in items}))
                for part, items in chosen.items()
            },
        )
        return {part: [examples[i] for i in items] for part, items in chosen.items()}

    harmful = divide("harmful", sets.advbench(), config.prompt_tokens, {
        "measure": config.harmful_measure, "attack": config.harmful_attack,
        "immunize": config.harmful_immunize, "align": config.harmful_align,
    })  # fmt: skip
    harmless = divide("harmless", sets.alpaca(), config.prompt_tokens + 4, {
        "measure": config.harmless_measure, "immunize": config.harmless_immunize, "align": config.harmless_align,
    })  # fmt: skip
    edgy = divide("edgy", sets.edgy(), None, {"measure": config.edgy_measure})
    benign = divide("benign", sets.commonsense(), config.benign_prompt_tokens, {
        "measure": config.benign_measure, "train": config.benign_train,
    })  # fmt: skip

    def encoded(name: str, examples: list[Example], tokens: int) -> list[Encoded]:
        made = [encode(tokenizer, e, tokens) for e in examples]
        sources[name]["cut"] += sum(is_cut(tokenizer, e) for e in made)
        return made

    def answered(examples: list[Example], answer: Callable[[str, int], str]) -> list[Encoded]:
        made = [Example(e.prompt, answer(str(e.prompt), i)) for i, e in enumerate(examples)]
        return encoded("harmful", made, config.answer_tokens)

    return Corpus(
        pad=padding(tokenizer),
        harmful={part: answered(e, sets.placeholder) for part, e in harmful.items() if part != "align"},
        safe={part: answered(harmful[part], lambda _, i: sets.refusal(i)) for part in ("align", "immunize")},
        harmless={part: encoded("harmless", harmless[part], config.retain_tokens) for part in ("align", "immunize")},
        benign_train=encoded("benign", benign["train"], config.answer_tokens),
        benign_measure=encoded("benign", benign["measure"], config.answer_tokens),
        requests=[e.prompt for e in harmful["measure"]],
        instructions=[e.prompt for e in harmless["measure"]],
        edgy=[e.prompt for e in edgy["measure"]],
        perplexity=lambda tokens: [encode(tokenizer, e, tokens) for e in harmless["measure"]],
        sources=sources,
    )

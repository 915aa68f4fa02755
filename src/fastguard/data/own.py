"""A run's own sets become its corpus: divided by similarity cluster or as their owner says, and encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fastguard.data import sets
from fastguard.data.chat import Encoded, is_cut, padding, with_answer
from fastguard.data.clusters import similarity_clusters, split_whole_clusters
from fastguard.data.conversation import Prompt, asked, identity
from fastguard.data.items import Item, LoadedSet, load_set
from fastguard.data.options import PACKAGED, UserData, shares
from fastguard.data.parts import Corpus
from fastguard.data.sources import DataSource, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build(tokenizer: PreTrainedTokenizerBase, own: UserData, seed: int = 0) -> Corpus:
    """Read, check, divide and encode a run's own sets.

    Raises ValueError: a row that does not fit (with its number and column), a set that is too small to be divided; and
    what `read_rows` raises.
    """
    pad = padding(tokenizer)
    loaded = {role: load_set(tokenizer, own, role, config) for role, config in own.sets()}
    notes: list[str] = []
    sources: dict[str, DataSource] = {}

    def divided(role: str, held_out: str | None, sizes: Mapping[str, float]) -> dict[str, list[Item]]:
        held = loaded.get(held_out) if held_out else None
        made, splits = _divide(loaded[role], held, sizes, own.split_off, seed, notes)
        sources[_NAMES.get(role, role)] = loaded[role].source(splits)
        if held is not None:
            sources[held.role] = held.source({"measure": splits["measure"]})
        return made

    harmful = divided("pairs", "measure_harmful", shares(own.pair_parts))
    harmless = divided("retain", "measure_harmless", shares(own.retain_parts))
    benign = divided("benign", None, shares(own.benign_parts)) if "benign" in loaded else {"train": [], "measure": []}
    edgy = loaded["edgy"].items if "edgy" in loaded else []
    if edgy:
        sources["edgy"] = loaded["edgy"].source({"measure": Split(prompts=len(edgy), clusters=None)})

    def encoded(role: str, part: str, items: Sequence[Item], column: str, tokens: int) -> list[Encoded]:
        if not items:
            return []
        held = {"pairs": "measure_harmful", "retain": "measure_harmless"}.get(role)
        owner = loaded[held] if part == "measure" and held in loaded else loaded[role]
        made = []
        for i, item in enumerate(items):
            answer = item.answers.get(column)
            if answer is None:
                answer = sets.placeholder(item.prompt, i) if column == "harmful" else sets.refusal(i)
            made.append(with_answer(tokenizer, item.ids, answer, tokens))
        name = _NAMES.get(owner.role, owner.role)
        sources[name]["cut"] += sum(is_cut(tokenizer, e) for e in made)
        return made

    corpus = Corpus(
        pad=pad,
        harmful={
            part: encoded("pairs", part, harmful[part], "harmful", own.answer_tokens)
            for part in ("immunize", "attack", "measure")
        },
        safe={
            part: encoded("pairs", part, harmful[part], "harmless", own.answer_tokens) for part in ("align", "immunize")
        },
        harmless={
            part: encoded("retain", part, harmless[part], "answer", own.retain_tokens) for part in ("align", "immunize")
        },
        benign_train=encoded("benign", "train", benign["train"], "answer", own.answer_tokens),
        benign_measure=encoded("benign", "measure", benign["measure"], "answer", own.answer_tokens),
        requests=_distinct(harmful["measure"]),
        instructions=_distinct(harmless["measure"]),
        edgy=_distinct(edgy),
        perplexity=lambda tokens: [
            with_answer(tokenizer, item.ids, item.answers["answer"], tokens) for item in harmless["measure"]
        ],
        sources=sources,
        notes=notes,
    )
    notes += _absent(corpus)
    return corpus


_NAMES = {"pairs": "harmful", "retain": "harmless"}  # as the packaged sets are called in a run's document


def _absent(corpus: Corpus) -> list[str]:
    """What cannot be measured, since there is nothing to measure it on."""
    said = {
        "No pairs to align with: the model is immunized as it is.": corpus.safe["align"],
        "No pairs for the attacker: no attack was run.": corpus.harmful["attack"],
        "No held-out harmful requests: refusal and compliance are not measured.": corpus.requests,
        "No held-out instructions: perplexity and over-refusal are not measured.": corpus.instructions,
        "No harmless prompts that sound dangerous (`edgy`): over-refusal on them is not measured.": corpus.edgy,
        "No harmless task to learn (`benign`): whether the model still learns is not measured.": (
            corpus.benign_train and corpus.benign_measure
        ),
    }
    return [text for text, items in said.items() if not items]


def _distinct(items: Iterable[Item]) -> list[Prompt]:
    """Each prompt once: one that has several answers would weigh more than others."""
    return list({identity(item.prompt): item.prompt for item in items}.values())


def _divide(
    given: LoadedSet, held: LoadedSet | None, sizes: Mapping[str, float], split_off: int, seed: int, notes: list[str]
) -> tuple[dict[str, list[Item]], dict[str, Split]]:
    """Items and counts by part; ``held``, where there is such a set, is the part ``measure``."""
    if held is not None:
        measured = {identity(item.prompt) for item in held.items}
        given.keep([i for i in given.items if identity(i.prompt) not in measured], f"also in {held.role}")
        if not given.items:
            raise ValueError(f"{given.role}: no row is left: {given.say()}")
        sizes = {**sizes, "measure": 0.0}
    items = [*given.items, *(held.items if held else ())]
    clusters = similarity_clusters([asked(item.prompt) for item in items])
    own = range(len(given.items))
    parts: dict[str, list[int]]
    if given.config.columns.part is not None and given.config.path != PACKAGED:
        parts = {name: [i for i in own if given.items[i].part == name] for name in sizes}
        if held is not None and parts["measure"]:
            raise ValueError(f"{given.role}: {len(parts['measure'])} rows are in the part measure, and {held.role} is "
                             "given as well; expected one of them")  # fmt: skip
        needed = "train" if "train" in sizes else "immunize"
        if not parts[needed]:
            raise ValueError(f"{given.role}: expected rows in the part {needed}, got none: {given.say()}")
    else:
        parts = split_set(given, clusters[: len(given.items)], sizes, split_off, seed)
    if held is not None:
        parts["measure"] = list(range(len(given.items), len(items)))
    used = {i for chosen in parts.values() for i in chosen}
    given.keep([item for i, item in enumerate(given.items) if i in used], "left over")
    measured_clusters = {clusters[i] for i in parts["measure"]}
    trained = [i for name, chosen in parts.items() if name != "measure" for i in chosen]
    near = sum(clusters[i] in measured_clusters for i in trained)
    if near:
        notes.append(
            f"{near} of the {len(trained)} prompts of {given.role} that are trained on resemble a held-out one (the "
            "same similarity cluster): what is measured there is partly memory."
        )
    splits = {
        name: Split(prompts=len(chosen), clusters=len({clusters[i] for i in chosen})) for name, chosen in parts.items()
    }
    return {name: [items[i] for i in chosen] for name, chosen in parts.items()}, splits


def split_set(
    given: LoadedSet, clusters: Sequence[int], sizes: Mapping[str, float], split_off: int, seed: int
) -> dict[str, list[int]]:
    """Whole clusters to parts: the items' numbers. Counts (2 or more) are kept exactly, shares (up to 1) nearly.

    Raises ValueError for a set that is too small, or too much alike, to be divided so.
    """
    targets = _targets(given, len(clusters), sizes, split_off)
    parts = split_whole_clusters(clusters, targets, seed)
    for name, size in targets.items():
        exact = sizes[name] > 1
        if len(parts[name]) < (size if exact else min(size, 1)):
            raise ValueError(
                f"{given.role}: part {name} should have {size} prompts and gets {len(parts[name])}: {len(clusters)} "
                f"prompts in {len(set(clusters))} similarity clusters, of which each goes to one part whole "
                f"({given.say()}); expected more prompts, other sizes, or a column of your own (columns.part)"
            )
        if exact:
            parts[name] = parts[name][:size]
        elif name == "measure":
            parts[name] = parts[name][:split_off]
    return parts


def _targets(given: LoadedSet, total: int, sizes: Mapping[str, float], split_off: int) -> dict[str, int]:
    """How many of ``total`` items each part should have."""
    targets = {name: int(size) if size > 1 else 0 for name, size in sizes.items()}
    weights = {name: size for name, size in sizes.items() if 0 < size <= 1}
    left = total - sum(targets.values())
    if left < len(weights):
        wanted = ", ".join(f"{name} {size:g}" for name, size in sizes.items() if size)
        raise ValueError(f"{given.role}: {total} prompts are too few for the parts {wanted} ({given.say()})")
    if "measure" in weights:
        share = max(1, round(left * weights["measure"] / sum(weights.values())))
        targets["measure"] = share if len(weights) == 1 else min(share, split_off, left - len(weights) + 1)
        left -= targets["measure"]
        del weights["measure"]
    for name, weight in weights.items():
        targets[name] = max(1, round(left * weight / sum(weights.values())))
    return targets

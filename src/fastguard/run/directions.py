"""Find a model's refusal directions: from two sets of prompts to a basis, the figures of its choice, and their file.

``fastguard directions MODEL --harmful FILE --harmless FILE --out FILE`` is this with a page; from Python:

    found = find("our/model", "harmful.jsonl", "harmless.jsonl")
    save(found, Path("refusal.safetensors"))

Each set is divided by similarity cluster: most prompts estimate, some choose among the candidates, and some, held out
from both, tell how well the classes are separated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastguard import __version__, models
from fastguard.data.chat import Encoded, collate, padding
from fastguard.data.clusters import similarity_clusters
from fastguard.data.conversation import asked, identity
from fastguard.data.items import Item, LoadedSet, load_prompts
from fastguard.data.options import SetConfig
from fastguard.data.own import split_set
from fastguard.data.sources import DataSource, Split
from fastguard.directions.found import Directions
from fastguard.directions.probe import separation
from fastguard.directions.select import NoCandidateError, Selection, select, select_anyway
from fastguard.directions.several import phases
from fastguard.directions.stream import Stream
from fastguard.evaluation.directions import Choice, Found, Refusals
from fastguard.evaluation.scores import generate_ids, verdict
from fastguard.machine import cpu_name
from fastguard.progress import Progress, silent
from fastguard.settings import SettingError, Settings, choice, number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMMON = ("I", "As", "Sorry")
"""How refusals begin where the model's own do not tell: the published words, and one more."""

LONGEST = 16
"""Positions that are read where nobody says how many."""

ANSWER = 8
"""Greedy tokens that tell whether an answer refuses."""


@dataclass(frozen=True)
class Options(Settings):
    """How directions are found; filters and numbers as published (arXiv 2406.11717)."""

    most: ClassVar[Mapping[str, int]] = {"validation": 32, "held_out": 100}

    positions: int | None = number(None, at_least=1)  # last tokens of a prompt; None: those that all prompts end with
    validation: int | None = number(None, at_least=2)  # prompts of a class that choose; None: 32, at most a quarter
    held_out: int | None = number(None, at_least=2)  # prompts that measure; None: 100, at most a quarter
    count: int = number(1, at_least=1, at_most=64)  # directions; each after the first is found under ablation
    refusal_tokens: tuple[str, ...] = ()  # words or ids; none: the model's own
    max_kl: float = number(0.1, at_least=0)
    min_steering: float = number(0.0)
    batch: int = number(16, at_least=1)  # prompts in one forward of the estimation
    prompt_tokens: int = number(512, at_least=1)  # longer prompts are dropped
    dtype: str = choice("auto", "auto", "float32", "bfloat16", "float64")
    device: str = "auto"
    chat_template: str = choice("model", "model", "plain")
    seed: int = 0  # of the division


def find(
    model: str, harmful: str | SetConfig, harmless: str | SetConfig, options: Options | None = None,
    progress: Progress = silent,
) -> Found:  # fmt: skip
    """Estimate on all layers and positions, choose as published, measure on held-out prompts.

    Args:
        model: a folder or id of a chat model, or ``smollm2``.
        harmful, harmless: sets of prompts (docs/data.md): a file, a folder, a Hub id, ``packaged``; or more about it.
        options: `Options`.
        progress: told of ``estimate``, of each question of the selection, and of ``separate``.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: what `load_prompts` and `models.load_model` raise; sets that
            are too small, or that share prompts; tokens that are none.
        NoCandidateError: no candidate passes the filters; the message says what can be done.
        FloatingPointError: means that are not finite.
    """
    start, options = time.perf_counter(), options or Options()
    tokenizer = models.load_tokenizer(model, plain=options.chat_template == "plain")
    given = {"harmful": _set(harmful), "harmless": _set(harmless)}
    loaded = {name: load_prompts(tokenizer, name, one, options.prompt_tokens) for name, one in given.items()}
    _refuse_shared(loaded)
    parts = {name: _divided(one, options) for name, one in loaded.items()}
    device = models.pick_device(options.device)
    dtype = models.pick_dtype(options.dtype, device)
    tokens = _given_tokens(tokenizer, options.refusal_tokens)
    lm = models.load_model(model, dtype, device)
    batches = {
        name: {part: _batches(items, padding(tokenizer), options.batch) for part, items in each.items()}
        for name, each in parts.items()
    }
    shared = _shared_end([item.ids for each in parts.values() for items in each.values() for item in items])
    positions = options.positions or max(1, min(len(shared), LONGEST))
    refusals = _refusals(lm, tokenizer, parts, tokens)
    search = _Search(lm, batches, refusals.tokens, positions, options, progress)
    basis = search.run()
    progress("separate", 0.0, "")
    means = search.found[0]
    auc = separation(lm, means, batches["harmful"]["held_out"], batches["harmless"]["held_out"])
    progress("separate", 1.0, f"AUC {float(auc[search.choices[0].at]):.3f} at the chosen place")
    return Found(
        model=model,
        basis=basis.cpu(),
        means=_with_origin(means, models.model_digest(model), parts),
        choices=search.choices[: len(basis)],  # of a last phase nothing may have been left
        separation=auc,
        refusals=refusals,
        position_tokens=_texts(tokenizer, shared, means.positions),
        max_kl=options.max_kl,
        min_steering=options.min_steering,
        wanted=options.count,
        sources={name: _source(loaded[name], parts[name]) for name in loaded},
        settings=options.to_dict(),
        dtype=str(dtype).removeprefix("torch."),
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        wall_s=time.perf_counter() - start,
    )


def save(found: Found, file: Path) -> None:
    """Write basis, means and origin as one safetensors file, whole or not at all.

    ``fastguard ablate``, ``edits.basis.read_basis`` and ``directions.Directions.load`` read it.
    """
    first = found.choices[0]
    about = {
        "fastguard": __version__,
        "model": found.model,
        "layer": str(first.layer),
        "position": str(first.position),
        "choices": json.dumps([one.plain() for one in found.choices]),
        "refusal_tokens": json.dumps(list(found.refusals.tokens)),
        "data": json.dumps(found.sources),
        "settings": json.dumps(found.settings),
        "dtype": found.dtype,
        "date": found.date,
    }
    found.means.save(file, found.basis, about)


# ----------------------------------------------------------------------------------------------------------------------


class _Search:
    """The directions of one model, phase by phase, and what was seen on the way."""

    def __init__(
        self, model: PreTrainedModel, batches: Mapping[str, Mapping[str, list[dict[str, Tensor]]]],
        tokens: Sequence[int], positions: int, options: Options, progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.tokens, self.positions = model, batches, tokens, positions
        self.options, self.progress = options, progress
        self.found: list[Directions] = []
        self.choices: list[Choice] = []
        self._basis: Tensor | None = None

    def run(self) -> Tensor:
        """The basis [K, D]."""
        harmful, harmless = (self.batches[name]["estimate"] for name in ("harmful", "harmless"))
        total = len(harmful) + len(harmless)
        stream = Stream(self.model)
        try:
            for basis in phases(
                self.model,
                _Told(harmful, 0, total, self._estimating),
                _Told(harmless, len(harmful), total, self._estimating),
                self.options.count,
                lambda means: self._choose(means, stream),
                positions=self.positions,
                stream=stream,
            ):
                self._basis = basis
        finally:
            stream.close()
        assert self._basis is not None
        return self._basis

    def _estimating(self, fraction: float) -> None:
        self.progress(self._named("estimate"), fraction, f"{self.positions} positions, all layers")

    def _named(self, stage: str) -> str:
        return stage if self.options.count == 1 else f"{stage}, direction {len(self.choices) + 1}"

    def _choose(self, means: Directions, stream: Stream) -> Tensor:
        """The choice of one phase, with the directions of those before it ablated."""
        search = select_anyway if self.choices else self._first
        with contextlib.nullcontext() if self._basis is None else stream.ablated(self._basis):
            chosen, passed = search(
                self.model,
                means,
                self.batches["harmful"]["validation"],
                self.batches["harmless"]["validation"],
                refusal_tokens=self.tokens,
                max_kl=self.options.max_kl,
                min_steering=self.options.min_steering,
                progress=lambda stage, fraction, text: self.progress(self._named(f"select: {stage}"), fraction, text),
            )
        self.found.append(means)
        self.choices.append(Choice(chosen, means.positions, passed))
        return chosen.direction

    def _first(self, *given: Any, **how: Any) -> tuple[Selection, bool]:
        """The first has to pass; those after it, which leave less to refuse and so to steer with, need not."""
        try:
            return select(*given, **how), True
        except NoCandidateError as error:
            raise NoCandidateError(self._advice(error)) from None

    @staticmethod
    def _advice(error: NoCandidateError) -> str:
        return (
            f"{error}. A model that does not refuse has no such direction; otherwise try more prompts, a larger "
            "--max-kl or a lower --min-steering, or name the tokens with which the model refuses (--refusal-tokens)"
        )


class _Told(list[Any]):
    """Batches that tell how many of all were handed out, however often they are gone through."""

    def __init__(self, batches: Sequence[Any], before: int, total: int, tell: Any) -> None:
        super().__init__(batches)
        self._before, self._total, self._tell = before, total, tell

    def __iter__(self) -> Iterator[Any]:
        for done, batch in enumerate(super().__iter__(), self._before):
            self._tell(done / self._total)
            yield batch
        self._tell((self._before + len(self)) / self._total)


def _set(given: str | SetConfig) -> SetConfig:
    return given if isinstance(given, SetConfig) else SetConfig(path=str(given))


def _refuse_shared(loaded: Mapping[str, LoadedSet]) -> None:
    """Raise ValueError for prompts that are in both sets: what they share is no difference."""
    bad, good = ({identity(item.prompt) for item in one.items} for one in loaded.values())
    if both := len(bad & good):
        raise ValueError(
            f"harmless: expected other prompts than those of {loaded['harmful'].rows.source}, got {both} of them in "
            f"{loaded['harmless'].rows.source}, too"
        )


def _divided(given: LoadedSet, options: Options) -> dict[str, list[Item]]:
    """The items that estimate, those that choose, and those that measure; no similarity cluster is in two."""
    quarter = len(given.items) // 4
    if quarter < 2:
        raise ValueError(f"{given.role}: expected at least 8 prompts, got {len(given.items)} ({given.say()})")
    sizes: dict[str, float] = {"estimate": 1.0}
    for name, most in Options.most.items():
        asked_for: int | None = getattr(options, name)
        sizes[name] = min(most, quarter) if asked_for is None else asked_for
    taken = int(sum(sizes.values()) - 1)
    if taken >= len(given.items):
        raise ValueError(
            f"{given.role}: expected more prompts than validation and held_out take, {taken}, got {len(given.items)} "
            f"({given.say()})"
        )
    clusters = similarity_clusters([asked(item.prompt) for item in given.items])
    parts = split_set(given, clusters, sizes, len(given.items), options.seed)
    return {name: [given.items[i] for i in chosen] for name, chosen in parts.items()}


def _source(given: LoadedSet, parts: Mapping[str, list[Item]]) -> DataSource:
    used = [item for items in parts.values() for item in items]
    given.keep(used, "left over")
    return given.source({name: Split(prompts=len(items), clusters=None) for name, items in parts.items()})


def _batches(items: Sequence[Item], pad: int, size: int) -> list[dict[str, Tensor]]:
    """Prompts of like length together, padded on the right."""
    rows = sorted((Encoded(item.ids, len(item.ids)) for item in items), key=lambda e: len(e.ids))
    made = [collate(rows[i : i + size], pad) for i in range(0, len(rows), size)]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in made]


def _shared_end(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens with which all prompts end: the chat template's, behind the instruction."""
    first = prompts[0]
    count = 0
    while count < min(map(len, prompts)) and all(ids[-1 - count] == first[-1 - count] for ids in prompts):
        count += 1
    return tuple(first[len(first) - count :])


def _texts(tokenizer: PreTrainedTokenizerBase, shared: Sequence[int], positions: Sequence[int]) -> tuple[str, ...]:
    """What stands at each position, where it is the same in all prompts; else empty."""
    return tuple(
        json.dumps(tokenizer.decode([shared[p]]), ensure_ascii=False)[1:-1] if -p <= len(shared) else ""
        for p in positions
    )


def _given_tokens(tokenizer: PreTrainedTokenizerBase, given: Sequence[str]) -> tuple[int, ...]:
    """Ids of words, by their first token, and of numbers."""
    found: dict[int, None] = {}
    for text in given:
        if text.strip().isdecimal():
            token = int(text)
            if token >= len(tokenizer):
                raise SettingError("refusal_tokens", text, f"ids below {len(tokenizer)}, or words")
        else:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise SettingError("refusal_tokens", text, "words or ids")
            token = int(ids[0])
        found[token] = None
    return tuple(found)


def _refusals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, Mapping[str, list[Item]]],
    given: tuple[int, ...],
) -> Refusals:  # fmt: skip
    """How many harmful prompts the model refuses, and the tokens that refusal is told by.

    Unless they are given: the first tokens of its greedy answers that refuse, but those with which it answers harmless
    prompts as often; and where there is none, the first tokens of `COMMON`.
    """
    first: dict[str, Counter[int]] = {}
    refused = 0
    for name in ("harmful", "harmless"):
        prompts = [item.ids for item in parts[name]["validation"]]
        answers = generate_ids(model, tokenizer, prompts, ANSWER)
        refuses = [verdict(t) == "refusal" for t in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        if name == "harmful":
            refused = sum(refuses)
            first[name] = Counter(a[0] for a, r in zip(answers, refuses, strict=True) if r)
        else:
            first[name] = Counter(a[0] for a in answers)
    bad, good = (len(parts[name]["validation"]) for name in first)
    own = tuple(
        token for token, n in first["harmful"].most_common()
        if n >= 0.1 * refused and n / bad > first["harmless"][token] / good
    )  # fmt: skip
    if given:
        tokens, source = given, "given"
    elif own:
        tokens, source = own, "own"
    else:
        tokens, source = _given_tokens(tokenizer, COMMON), "common"
    return Refusals(tokens, tuple(str(tokenizer.decode([t])) for t in tokens), source, refused, bad)


def _with_origin(means: Directions, digest: str, parts: Mapping[str, Mapping[str, list[Item]]]) -> Directions:
    """The means, with the hashes of the model and of the prompts that they are of."""
    rows = {name: sorted(item.ids for item in each["estimate"]) for name, each in parts.items()}
    data = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return dataclasses.replace(means, model_hash=digest, data_hash=data)

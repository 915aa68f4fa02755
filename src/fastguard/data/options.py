"""What a run's own data are: files, columns, limits and parts, as a configuration says them. Free of torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGED = "packaged"
"""As a ``path``: the public set that the demo uses in this role."""

ON_BAD_ROW = ("error", "drop")


@dataclass(frozen=True)
class Columns:
    """The names of a set's columns. Only those that the set's role needs are read."""

    prompt: str = "prompt"  # a string, or chat messages that end with the user's turn
    harmful: str = "harmful"  # pairs: the answer to be unlearned; a string or an assistant's message
    harmless: str = "harmless"  # pairs: the refusal, or another safe answer
    answer: str = "answer"  # of ordinary instructions
    messages: str = "messages"  # a whole conversation, read where a row has no answer column
    system: str | None = None  # a row's own system prompt
    part: str | None = None  # your own division: align, immunize, attack, measure


@dataclass(frozen=True)
class SetConfig:
    """One set: where it lies, and how its rows are read."""

    path: str = ""  # .jsonl, .json or .parquet file, folder of datasets.save_to_disk, Hub id, or `packaged`
    subset: str | None = None  # of a Hub dataset
    split: str | None = None  # of a folder or a Hub dataset; may be left out where there is only one
    revision: str | None = None  # of a Hub dataset
    columns: Columns = field(default_factory=Columns)
    system: str | None = None  # system prompt of the conversations that bring none
    limit: int | None = None  # rows read, from the first
    placeholders: bool = False  # harmful answers are placeholders, whatever the rows hold
    refusals: bool = False  # safe answers are the packaged refusals, whatever the rows hold


@dataclass(frozen=True)
class PairParts:
    """How pairs are divided: counts (2 or more) first, then shares (up to 1) of what they leave; 0: no such part."""

    align: float = 0.2
    immunize: float = 0.4
    attack: float = 0.25
    measure: float = 0.15  # 0 where `measure_harmful` is given


@dataclass(frozen=True)
class RetainParts:
    """How ordinary instructions are divided; numbers as in `PairParts`."""

    align: float = 0.4
    immunize: float = 0.5
    measure: float = 0.1  # 0 where `measure_harmless` is given


@dataclass(frozen=True)
class BenignParts:
    """How the harmless task is divided; numbers as in `PairParts`."""

    train: float = 0.8
    measure: float = 0.2


@dataclass(frozen=True)
class UserData:
    """A run's own sets, by role. Absent ones are not measured.

    Raises ValueError that names the key, what was given and what was expected.
    """

    pairs: SetConfig = field(default_factory=SetConfig)  # harmful requests with harmful and safe answers
    retain: SetConfig = field(default_factory=SetConfig)  # ordinary instructions with answers
    measure_harmful: SetConfig | None = None  # held-out requests; None: split off from the pairs
    measure_harmless: SetConfig | None = None  # held-out instructions; None: split off from `retain`
    edgy: SetConfig | None = None  # harmless prompts that sound dangerous; no answers
    benign: SetConfig | None = None  # a harmless task to learn after immunization
    pair_parts: PairParts = field(default_factory=PairParts)
    retain_parts: RetainParts = field(default_factory=RetainParts)
    benign_parts: BenignParts = field(default_factory=BenignParts)
    prompt_tokens: int = 512  # longer prompts are dropped; counted in the chat template, system prompt included
    answer_tokens: int = 256  # answers of pairs and of the harmless task are cut here
    retain_tokens: int = 256  # answers of ordinary instructions are cut here in training
    split_off: int = 200  # a share held out for measurement is no larger than this
    on_bad_row: str = "error"  # or drop: rows that do not fit are left out and counted

    def __post_init__(self) -> None:
        def require(ok: bool, key: str, value: object, expected: str) -> None:
            if not ok:
                raise ValueError(f"{key}: expected {expected}, got {value!r}")

        for role, one in self.sets():
            require(bool(one.path), f"{role}.path", one.path, f"a file, a folder, a Hub id or `{PACKAGED}`")
            require(one.limit is None or one.limit >= 1, f"{role}.limit", one.limit, "at least 1, or null")
            part = one.columns.part
            divided = f"null; only {', '.join(_DIVIDED)} are divided"
            require(part is None or role in _DIVIDED, f"{role}.columns.part", part, divided)
            answered = role in ("pairs", "measure_harmful")
            require(answered or not one.placeholders, f"{role}.placeholders", one.placeholders, "false in this role")
            require(role == "pairs" or not one.refusals, f"{role}.refusals", one.refusals, "false in this role")
            if one.path == PACKAGED:
                require(one.columns == Columns(), f"{role}.columns", one.columns, "none: a packaged set has its own")
                require(one.placeholders or not answered, f"{role}.placeholders", one.placeholders,
                        "true: the packaged requests have no harmful answers")  # fmt: skip
                require(one.refusals or role != "pairs", f"{role}.refusals", one.refusals,
                        "true: the packaged requests have no safe answers")  # fmt: skip
        for name, parts in (("pair_parts", self.pair_parts), ("retain_parts", self.retain_parts),
                            ("benign_parts", self.benign_parts)):  # fmt: skip
            for part, size in shares(parts).items():
                whole = size == int(size) if math.isfinite(size) else False
                require(0 <= size <= 1 or (size >= 2 and whole), f"{name}.{part}", size,
                        "a share from 0 to 1, or a count of 2 or more")  # fmt: skip
            needed = "train" if name == "benign_parts" else "immunize"
            require(shares(parts)[needed] > 0, f"{name}.{needed}", shares(parts)[needed], "more than 0")
        for key in ("prompt_tokens", "answer_tokens", "retain_tokens", "split_off"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "an integer >= 1")
        require(self.on_bad_row in ON_BAD_ROW, "on_bad_row", self.on_bad_row, " or ".join(ON_BAD_ROW))

    def sets(self) -> Iterator[tuple[str, SetConfig]]:
        """The sets that are given, with their roles."""
        for role in ("pairs", "retain", "measure_harmful", "measure_harmless", "edgy", "benign"):
            one = getattr(self, role)
            if one is not None:
                yield role, one

    def located(self, folder: str | Path) -> UserData:
        """The same data, with relative paths that exist under ``folder`` (the configuration's) taken from there."""
        found = {}
        for role, one in self.sets():
            beside = Path(folder) / one.path
            if one.path != PACKAGED and not Path(one.path).is_absolute() and beside.exists():
                found[role] = dataclasses.replace(one, path=str(beside))
        return dataclasses.replace(self, **found)  # type: ignore[arg-type]


_DIVIDED = ("pairs", "retain", "benign")


def shares(parts: PairParts | RetainParts | BenignParts) -> Mapping[str, float]:
    """The numbers of a division, by part."""
    return dataclasses.asdict(parts)

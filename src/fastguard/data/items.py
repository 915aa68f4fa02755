"""Rows of a run's own sets, checked one by one and counted.

Errors name the set, the row and the column, and never quote a text: it may be a harmful one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastguard.data import sets
from fastguard.data.chat import encode_prompt
from fastguard.data.conversation import (
    EmptyText,
    Prompt,
    checked_answer,
    checked_prompt,
    identity,
    kind,
    split_conversation,
)
from fastguard.data.options import PACKAGED, Columns, SetConfig, UserData, shares
from fastguard.data.rows import Row, Rows, read_rows
from fastguard.data.sources import DataSource, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGED = {
    "pairs": "advbench",
    "measure_harmful": "advbench",
    "retain": "alpaca",
    "measure_harmless": "alpaca",
    "edgy": "edgy",
    "benign": "commonsense",
    "harmful": "advbench",
    "harmless": "alpaca",
    "safety": "advbench",
    "utility": "alpaca",
}

PROMPTS = ("edgy", "harmful", "harmless")
"""Roles of which the prompts alone are read."""

ANSWERED = ("retain", "measure_harmless", "benign", "safety", "utility")
"""Roles of which prompts and answers are read; those of ``safety`` may be made up, as refusals."""


class _BadRow(ValueError):
    """A row that does not fit, with the reason it is counted under where such rows are dropped."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Item:
    """A row that fits.

    ids: the prompt in the chat template. answers: ``harmful`` and ``harmless``, or ``answer``; those that will be made
    up (placeholders, refusals) are missing.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    answers: Mapping[str, str]
    part: str | None


@dataclass
class LoadedSet:
    """The rows of one set that fit, and the counts of those that do not."""

    role: str
    config: SetConfig
    rows: Rows
    items: list[Item] = field(default_factory=list)
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0

    def source(self, splits: dict[str, Split]) -> DataSource:
        """The set's entry in the document of a run."""
        return DataSource(
            source=self.rows.source,
            licence=self.rows.licence or "not stated",
            fingerprint=self.rows.fingerprint,
            rows=self.read,
            dropped=dict(self.dropped),
            cut=self.cut,
            splits=splits,
        )

    def keep(self, items: list[Item], reason: str) -> None:
        """Go on with these items; the others are counted under ``reason``."""
        if len(items) < len(self.items):
            self.dropped[reason] += len(self.items) - len(items)
        self.items = items

    def say(self) -> str:
        """What was read and dropped, for an error."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
        return f"{self.read} rows of {self.rows.source}, dropped: {reasons or 'none'}"


def load_set(tokenizer: PreTrainedTokenizerBase, own: UserData, role: str, config: SetConfig) -> LoadedSet:
    """Read a set, leave out and count empty, long and repeated rows.

    Raises ValueError: a row that does not fit, unless ``own.on_bad_row`` is ``drop``; a set of which nothing is left;
    a tokenizer without chat template. And what `read_rows` raises.
    """
    parts = {"retain": shares(own.retain_parts), "benign": shares(own.benign_parts)}.get(role, shares(own.pair_parts))
    return _loaded(tokenizer, role, config, own.prompt_tokens, own.on_bad_row, tuple(parts))


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, role: str, config: SetConfig, prompt_tokens: int, on_bad_row: str = "error"
) -> LoadedSet:
    """Read the prompts of a set, ``role`` one of `PROMPTS`; arguments and errors as `load_set`."""
    return _loaded(tokenizer, role, config, prompt_tokens, on_bad_row, ())


def load_answered(
    tokenizer: PreTrainedTokenizerBase, role: str, config: SetConfig, prompt_tokens: int, on_bad_row: str = "error"
) -> LoadedSet:
    """Read the conversations of a set, ``role`` one of `ANSWERED`; arguments and errors as `load_set`."""
    return _loaded(tokenizer, role, config, prompt_tokens, on_bad_row, ())


def _loaded(
    tokenizer: PreTrainedTokenizerBase, role: str, config: SetConfig, prompt_tokens: int, on_bad_row: str,
    parts: Sequence[str],
) -> LoadedSet:  # fmt: skip
    if config.path == PACKAGED:
        rows, columns = _packaged(role), Columns()
    else:
        rows, columns = read_rows(config.path, config.split, config.subset, config.revision), config.columns
    made = LoadedSet(role, config, rows)
    seen: set[object] = set()
    part_of: dict[object, tuple[str | None, int]] = {}
    for number, row in itertools.islice(rows, config.limit):
        made.read += 1
        try:
            prompt, answers = _texts(role, row, config, columns)
            part = _part(row, columns, parts)
            same = identity(prompt)
            first = part_of.setdefault(same, (part, number))
            if first[0] != part:
                raise _BadRow("prompt in two parts", f"column {columns.part!r}: expected {first[0]!r} as in "
                              f"{rows.place(first[1])}, which has the same prompt, got {part!r}")  # fmt: skip
            try:
                ids = tuple(encode_prompt(tokenizer, prompt))
            except ValueError as error:
                if getattr(tokenizer, "chat_template", None):
                    raise _BadRow("refused by the chat template", str(error)) from error
                raise  # no template: not this row's fault
        except EmptyText:
            made.dropped["empty"] += 1
            continue
        except _BadRow as error:
            if on_bad_row == "error":
                raise ValueError(f"{role}: {rows.place(number)}: {error}") from error
            made.dropped[error.reason] += 1
            continue
        whole = (same, *(" ".join(a.split()) for a in answers.values()))
        if len(ids) > prompt_tokens:
            made.dropped["prompt too long"] += 1
        elif whole in seen:
            made.dropped["duplicate"] += 1
        else:
            seen.add(whole)
            made.items.append(Item(prompt, ids, answers, part))
    if not made.items:
        raise ValueError(
            f"{role}: no row is left: {made.say()}; prompts may have {prompt_tokens} tokens (prompt_tokens)"
        )
    return made


def _packaged(role: str) -> Rows:
    data: sets.DataSet = getattr(sets, _PACKAGED[role])()
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in data.examples]
    return Rows(data.source, None, False, data.licence, lambda: iter(enumerate(rows)))


def _texts(role: str, row: Row, config: SetConfig, columns: Columns) -> tuple[Prompt, dict[str, str]]:
    """Prompt and answers of a row. Raises _BadRow or EmptyText."""
    system = config.system
    if columns.system is not None and _given(row, columns.system) is not None:
        system = _read(columns.system, _text, row[columns.system])
    conversation = row.get(columns.messages)
    if role in ANSWERED and not config.refusals:
        if row.get(columns.answer) is None and conversation is not None:
            prompt, answer = _read(columns.messages, split_conversation, conversation, system)
            return prompt, {"answer": answer}
        if columns.answer not in row and columns.messages not in row:
            raise _BadRow("missing column", f"expected a column {columns.answer!r} or {columns.messages!r}, got "
                          f"{_names(row)}")  # fmt: skip
        wanted = {"answer": columns.answer}
    elif role in PROMPTS or role in ANSWERED:
        if row.get(columns.prompt) is None and conversation is not None:
            return _read(columns.messages, _opening, conversation, system), {}
        wanted = {}
    else:
        wanted = {} if config.placeholders else {"harmful": columns.harmful}
        if role == "pairs" and not config.refusals:
            wanted["harmless"] = columns.harmless
    prompt = _read(columns.prompt, checked_prompt, _given(row, columns.prompt), system)
    answers = {}
    for name, column in wanted.items():
        more = {"harmful": "; `placeholders: true` does without", "harmless": "; `refusals: true` does without"}
        answers[name] = _read(column, checked_answer, _given(row, column, more.get(name, "")))
    return prompt, answers


def _opening(conversation: object, system: str | None) -> Prompt:
    """The prompt of a conversation that may or may not have been answered."""
    answered = isinstance(conversation, Sequence) and len(conversation) > 1
    if answered and isinstance(conversation[-1], Mapping) and conversation[-1].get("role") == "assistant":  # type: ignore[index]
        conversation = conversation[:-1]  # type: ignore[index]
    return checked_prompt(conversation, system)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {kind(value)}")
    if not value.strip():
        raise EmptyText("expected a system prompt, got an empty string")
    return value


def _given(row: Row, column: str, more: str = "") -> Any:
    if column not in row:
        raise _BadRow("missing column", f"expected a column {column!r}, got {_names(row)}{more}")
    return row[column]


def _names(row: Row) -> str:
    return ", ".join(repr(name) for name in row) or "none"


def _read(column: str, read: Any, *values: object) -> Any:
    """``read(*values)``; what it raises is told with the column."""
    try:
        return read(*values)
    except EmptyText:
        raise
    except TypeError as error:
        raise _BadRow("wrong type", f"column {column!r}: {error}") from error
    except ValueError as error:
        raise _BadRow("not a conversation", f"column {column!r}: {error}") from error


def _part(row: Row, columns: Columns, parts: Sequence[str]) -> str | None:
    if columns.part is None:
        return None
    part = _given(row, columns.part)
    if part not in parts:
        shown = repr(part) if isinstance(part, str) and len(part) < 40 else kind(part)
        raise _BadRow("unknown part", f"column {columns.part!r}: expected one of {', '.join(parts)}, got {shown}")
    return str(part)

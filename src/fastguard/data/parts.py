"""What a run is given: encoded data by role and part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastguard.data.chat import Encoded
from fastguard.data.conversation import Prompt
from fastguard.data.sources import DataSource


@dataclass(frozen=True)
class Corpus:
    """Encoded data of a run.

    harmful: requests with harmful answers or placeholders for them; safe: the same requests, item by item, with
    refusals; harmless: ordinary instructions with answers; requests, instructions, edgy: held-out prompts to answer,
    strings or chat messages. What a run of its own data lacks is empty, and ``notes`` say so.
    """

    pad: int
    harmful: dict[str, list[Encoded]]
    safe: dict[str, list[Encoded]]
    harmless: dict[str, list[Encoded]]
    benign_train: list[Encoded]
    benign_measure: list[Encoded]
    requests: Sequence[Prompt]
    instructions: Sequence[Prompt]
    edgy: Sequence[Prompt]
    perplexity: Callable[[int], list[Encoded]]
    sources: dict[str, DataSource]
    notes: list[str] = field(default_factory=list)

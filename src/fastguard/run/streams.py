"""The batches of a run by number: what each role of a method is drawn from, as functions that need no state."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastguard.data.chat import Encoded, collate, collate_pairs
from fastguard.data.corpus import Corpus
from fastguard.methods.training import Batch, Role, Stream
from fastguard.ranks import DataRanks, data_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Order:
    """Batches of ``count`` numbers below ``total`` by number: every one once, in a new order, before any comes again.

    Raises ValueError unless there is at least one of each.
    """

    def __init__(self, total: int, count: int, seed: int) -> None:
        if total < 1 or count < 1:
            raise ValueError(f"batches: got {total} items and a batch of {count}, expected at least one of each")
        self.total, self.count = total, count
        self._rng = random.Random(seed)
        self._drawn: list[int] = []  # of all passes so far: a function of the seed

    def __call__(self, number: int) -> list[int]:
        """Batch ``number``."""
        first = number * self.count
        while len(self._drawn) < first + self.count:
            fresh = list(range(self.total))
            self._rng.shuffle(fresh)
            self._drawn += fresh
        return self._drawn[first : first + self.count]


class Share:
    """A process's samples of a batch that is drawn for all: consecutive ones, padded as the whole is."""

    def __init__(self, ranks: DataRanks) -> None:
        self.rank, self.size = ranks.rank, ranks.size

    def of(self, batch: Batch) -> Batch:
        """Raises ValueError for a batch of which not everybody would get a sample."""
        samples = len(batch["input_ids"])
        if samples < self.size:
            raise ValueError(
                f"batch: expected at least {self.size} samples, one a data rank, got {samples} (immunize.pairs and "
                "retain, align, attack.batch, evaluate.benign_batch, or the method's own option)"
            )
        return {name: t.tensor_split(self.size)[self.rank] for name, t in batch.items()}


class Streams:
    """Batches of a corpus's part; of each the samples of this process.

    Args:
        corpus: of the run. model: as it will be trained: it says on which device, and among whom a batch is divided.
        pairs, retain: samples of a step, of all processes; without ``retain``, ``safe`` is refusals alone.
        seed: of the order. part: of the corpus.
    """

    def __init__(
        self, corpus: Corpus, model: PreTrainedModel, pairs: int, retain: int, seed: int, part: str = "immunize"
    ) -> None:  # fmt: skip
        self.part, self.share, device = part, Share(data_ranks(model)), str(model.device)
        self.corpus, self.device, self.pairs, self.retain, self.seed = corpus, device, pairs, retain, seed
        self._makers: Mapping[str, Callable[[int | None], Stream]] = {
            "harmful": lambda n: self._of(self._harmful, n or pairs, 2, alike=n == 1),
            "refusal": lambda n: self._of(self._safe, n or pairs, 0),
            "retain": lambda n: self._of(self._harmless, n or retain, 1),
            "benign": lambda n: self._of(self._harmless, n or retain, 3),
            "safe": lambda n: self._together(),
            "pair": lambda n: self._paired(n or pairs),
            "attacker": lambda n: self._of(self._harmful[: self._middle], n or pairs, 2),
            "held_out": lambda n: self._held_out(n or pairs, False),
            "preference": lambda n: self._held_out(n or pairs, True),
        }

    def of(self, roles: Mapping[str, Role]) -> dict[str, Stream]:
        """A stream for each role. Raises ValueError for data that a run does not have."""
        for name, role in roles.items():
            if role.data not in self._makers:
                raise ValueError(f"roles: {name}: expected data {', '.join(self._makers)}, got {role.data!r}")
        return {name: self._makers[role.data](role.count) for name, role in roles.items()}

    @property
    def _harmful(self) -> list[Encoded]:
        return self.corpus.harmful[self.part]

    @property
    def _safe(self) -> list[Encoded]:
        """Refusals of the same requests, item by item."""
        return self.corpus.safe[self.part]

    @property
    def _harmless(self) -> list[Encoded]:
        return self.corpus.harmless[self.part]

    @property
    def _middle(self) -> int:
        """Requests below are the simulated attackers', those from here on are held out from them."""
        return max(len(self._harmful) // 2, 1)

    def collate(self, rows: list[Encoded]) -> Batch:
        """One batch on the model's device."""
        return self.share.of(collate(rows, self.corpus.pad, self.device))

    def _of(self, rows: list[Encoded], count: int, seed: int, alike: bool = False) -> Stream:
        """alike: of a single sample, which a method asks for, there is nothing to divide: all processes read it."""
        order = Order(len(rows), count, self.seed + seed)
        if alike:
            return lambda number: collate([rows[i] for i in order(number)], self.corpus.pad, self.device)
        return lambda number: self.collate([rows[i] for i in order(number)])

    def _together(self) -> Stream:
        refusals = Order(len(self._safe), self.pairs, self.seed)
        answers = Order(len(self._harmless), self.retain, self.seed + 1) if self.retain else None

        def together(number: int) -> Batch:
            kept = [self._harmless[i] for i in answers(number)] if answers else []
            return self.collate([*(self._safe[i] for i in refusals(number)), *kept])

        return together

    def _paired(self, count: int) -> Stream:
        order = Order(len(self._harmful), count, self.seed)

        def pair(number: int) -> dict[str, Batch]:
            chosen = order(number)
            bad, good = collate_pairs(
                [self._harmful[i] for i in chosen], [self._safe[i] for i in chosen], self.corpus.pad, self.device
            )
            return {"harmful": self.share.of(bad), "harmless": self.share.of(good)}

        return pair

    def _held_out(self, count: int, preference: bool) -> Stream:
        held_out = range(self._middle % len(self._harmful), len(self._harmful))
        order = Order(len(held_out), count, self.seed + 4)

        def batch(number: int) -> Any:
            at = [held_out[i] for i in order(number)]
            harmful = self.collate([self._harmful[i] for i in at])
            return {"chosen": self.collate([self._safe[i] for i in at]), "rejected": harmful} if preference else harmful

        return batch


def plain(corpus: Corpus, rows: list[Encoded], count: int, seed: int, model: PreTrainedModel) -> Stream:
    """Batches of one list of samples; of each those of this process."""
    order, share = Order(len(rows), count, seed), Share(data_ranks(model))
    return lambda number: share.of(collate([rows[i] for i in order(number)], corpus.pad, model.device))


def evidence(corpus: Corpus, roles: Mapping[str, Role], count: int, device: str) -> dict[str, list[Batch]]:
    """All that a role of an edit reads, in batches of ``count``.

    ``attack`` and ``instructions`` end where the answer begins; ``harmful``, ``refusal`` and ``retain`` have it. All
    but ``attack``, the attacker's, are the defender's.

    Raises ValueError for data that a run does not have, or that have no sample.
    """
    found: dict[str, list[Batch]] = {}
    known = {
        "attack": corpus.harmful.get("attack", []),
        "instructions": corpus.harmless.get("immunize", []),
        "harmful": corpus.harmful.get("immunize", []),
        "refusal": corpus.safe.get("immunize", []),
        "retain": corpus.harmless.get("immunize", []),
    }
    for name, role in roles.items():
        if role.data not in known:
            raise ValueError(f"roles: {name}: expected data {', '.join(known)}, got {role.data!r}")
        rows = known[role.data][: role.count]
        if role.data in ("attack", "instructions"):
            rows = [Encoded(e.ids[: e.prompt], e.prompt) for e in rows]
        if not rows:
            raise ValueError(f"roles: {name}: expected samples of {role.data!r}, and the run has none")
        found[name] = [collate(rows[i : i + count], corpus.pad, device) for i in range(0, len(rows), count)]
    return found

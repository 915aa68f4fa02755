"""Score a model's weights on two sets of conversations, and prune what safety needs and utility does not.

``fastguard saliency MODEL --safety FILE --utility FILE --out DIR`` is `measure`, with a page; ``fastguard prune MODEL
--scores DIR --safety-top Q --utility-top P --out DIR`` is `prune`. In DIR each set's sums lie in a folder of its own,
as `fastguard.saliency.Scores.load` opens them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastguard import __version__, models
from fastguard.data import sets
from fastguard.data.chat import Encoded, collate, is_cut, padding, with_answer
from fastguard.data.items import LoadedSet, load_answered
from fastguard.data.options import PACKAGED, SetConfig
from fastguard.data.sources import DataSource, Split
from fastguard.edits.shards import Folder, Shard, as_tensor, read_bytes
from fastguard.edits.stream import Streamed, source_folder, stream
from fastguard.evaluation.saliency import Measured, mapped
from fastguard.machine import cpu_name, locked, write_json
from fastguard.ops.masks import count_bits
from fastguard.progress import Progress, silent
from fastguard.saliency.choose import at_random, set_difference, top, weights_of
from fastguard.saliency.collect import TOKENS, Collect
from fastguard.saliency.file import write_tensors
from fastguard.saliency.prune import pruning
from fastguard.saliency.scores import SCORES, Scores
from fastguard.saliency.sums import STATISTICS
from fastguard.settings import SettingError, Settings, choice, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("safety", "utility")
ABOUT = "saliency.json"
UNFINISHED = "unfinished.safetensors"


@dataclass(frozen=True)
class Options(Settings):
    """How weights are scored; 128 samples a set, as published (arXiv 2402.05162)."""

    statistics: tuple[str, ...] = ("snip", "wanda")
    samples: int | None = number(128, at_least=1)  # of each set, the first; None: all
    batch: int = number(8, at_least=1)
    prompt_tokens: int = number(512, at_least=1)  # longer prompts are dropped
    answer_tokens: int = number(512, at_least=1)  # longer answers are cut
    tokens: str = choice("answer", *TOKENS)  # that the statistics of inputs are of
    vocabulary: bool = False  # embedding and head too
    score: str = choice("snip", *SCORES)  # that the page shows
    safety_top: float = number(0.05, above=0, at_most=1)
    utility_top: float = number(0.05, above=0, at_most=1)
    save_seconds: float = number(300.0, above=0)  # between the states that an interrupted run is taken up from
    dtype: str = choice("auto", "auto", "float32", "bfloat16", "float64")
    device: str = "auto"
    chat_template: str = choice("model", "model", "plain")

    def check(self) -> None:
        """Statistics that there are, and that the score is made of."""
        unknown = [name for name in self.statistics if name not in STATISTICS]
        if unknown or not self.statistics:
            raise SettingError("statistics", list(self.statistics), f"some of {', '.join(STATISTICS)}")
        if self.score != "magnitude" and self.score not in self.statistics:
            raise SettingError("score", self.score, f"one of the statistics that are collected, {self.statistics}")


def measure(
    model: str, safety: str | SetConfig, utility: str | SetConfig, out: Path, options: Options | None = None,
    progress: Progress = silent,
) -> Measured:  # fmt: skip
    """Sum the statistics of each set into ``out``; a set that is there already, of the same input, is kept.

    Args:
        model: a folder or id of a chat model, or ``smollm2``.
        safety: conversations that a safe model answers safely, refusals above all; utility: ordinary ones. A file, a
            folder, a Hub id, ``packaged``; or more about it (docs/data.md).
        out: a folder; a run that was interrupted there is taken up.
        options: `Options`. progress: told of each set, and of the comparison.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: what `load_answered` and `models.load_model` raise.
        FloatingPointError: a loss or a sum is not finite; the message names it.
        RuntimeError: another process writes to ``out``.
    """
    start, options = time.perf_counter(), options or Options()
    tokenizer = models.load_tokenizer(model, plain=options.chat_template == "plain")
    loaded = {
        role: _load(tokenizer, role, given, options) for role, given in zip(ROLES, (safety, utility), strict=True)
    }
    encoded = {role: _encoded(tokenizer, one, options) for role, one in loaded.items()}
    device = models.pick_device(options.device)
    dtype = models.pick_dtype(options.dtype, device)
    digest = models.model_digest(model)
    with locked(out):
        job = _Job(model, digest, dtype, device, padding(tokenizer), options, progress)
        found = {role: job.scores(role, rows, out / role) for role, rows in encoded.items()}
        weights = weights_of(job.model)
        maps = mapped(found, weights, options.score, options.safety_top, options.utility_top, progress)
        measured = Measured(
            model=model, model_sha256=digest, maps=maps, sources={role: _source(loaded[role]) for role in ROLES},
            samples={role: one.samples for role, one in found.items()}, settings=options.to_dict(),
            dtype=str(dtype).removeprefix("torch."),
            machine=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            wall_s=time.perf_counter() - start,
        )  # fmt: skip
        write_json(out / ABOUT, measured.plain())
    return measured


@dataclass(frozen=True)
class Pruned:
    """What was written: the folder, how many entries were set, of how many that were scored."""

    streamed: Streamed
    entries: int
    scored: int


def prune(
    model: str, scores: Path, out: Path, safety_top: float, utility_top: float, *, score: str = "snip",
    per: str = "tensor", base: str | None = None, random: int | None = None, overwrite: bool = False,
    progress: Progress = silent,
) -> Pruned:  # fmt: skip
    """Write ``out``, a folder that ``from_pretrained`` loads: ``model`` without what safety needs and utility does not.

    Args:
        model: a folder with safetensors, or an id. scores: the folder of `measure`. out: the folder to write.
        safety_top, utility_top: shares, see `fastguard.saliency.set_difference`; utility_top 0: the safety score alone.
        score, per: see `fastguard.saliency.top`.
        base: a model whose weights take the place of those pruned; None: 0.
        random: a seed; as many entries of each weight are then pruned, drawn evenly: what to compare with.
        overwrite: delete ``out`` first if it holds something else.

    Raises:
        FileNotFoundError, ValueError: no such model or scores; a weight that was scored and is not in the files.
        FileExistsError, OSError, RuntimeError, TypeError: see ``fastguard.edits.stream``.
    """
    source = source_folder(model)
    found = {role: Scores.load(_scores_folder(scores) / role) for role in ROLES}
    _same_model(source, found, scores)
    weights = weights_of(source)

    def told(done: int, total: int) -> None:
        progress("choose", min(done / total, 1.0), f"{done} of {total} weights")

    if utility_top:
        masks = set_difference(
            found["safety"], found["utility"], weights, safety_top, utility_top, score=score, per=per, progress=told
        )
    else:
        masks = top(found["safety"], weights, safety_top, score=score, per=per, progress=told)
    counts = {name: int(count_bits(mask)) for name, mask in masks.items()}
    if random is not None:
        masks = at_random(weights, counts, random)
    origin = {
        "scores": str(scores), "score": score, "per": per, "safety_top": safety_top, "utility_top": utility_top,
        "random": random, **{role: one.about for role, one in found.items()},
    }  # fmt: skip
    edit = pruning(source, masks, None if base is None else source_folder(base), origin)
    done = stream(source, out, edit, name=model, overwrite=overwrite, progress=progress)
    scored = sum(math.prod(source.tensors[name].shape) for name in masks)
    return Pruned(done, sum(counts.values()), scored)


# ----------------------------------------------------------------------------------------------------------------------


class _Job:
    """The sets of one run: a model that is loaded when a set is not there yet."""

    def __init__(
        self, name: str, digest: str, dtype: torch.dtype, device: torch.device, pad: int, options: Options,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.digest, self.device, self.pad = digest, device, pad
        self.options, self.progress, self.name = options, progress, name
        self.model = models.load_model(name, dtype, device)
        self.dtype = dtype

    def scores(self, role: str, rows: Sequence[Encoded], folder: Path) -> Scores:
        """The scores of a set: from its file, or by going on where its last state was kept."""
        key = self._key(rows)
        try:
            there = Scores.load(folder)
            if there.about.get("key") == key:
                self.progress(role, 1.0, "found from an earlier run")
                return there
        except (FileNotFoundError, ValueError):
            pass
        collect = Collect(
            self.model, self.options.statistics, vocabulary=self.options.vocabulary, tokens=self.options.tokens
        )
        try:
            self._sum(role, collect, rows, folder, key)
            about = {"key": key, "model": self.name, "model_sha256": self.digest, "fastguard": __version__, "set": role}
            collect.scores(about).save(folder)
        finally:
            collect.close()
        (folder / UNFINISHED).unlink(missing_ok=True)
        return Scores.load(folder)

    def _sum(self, role: str, collect: Collect, rows: Sequence[Encoded], folder: Path, key: str) -> None:
        ordered = sorted(rows, key=lambda row: -len(row.ids))  # like lengths together; the largest batch first
        size = self.options.batch
        batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        done = _taken_up(collect, folder / UNFINISHED, key)
        saved = time.monotonic()
        loss, samples = 0.0, 0
        for number_, batch in enumerate(batches[done:], done + 1):
            loss += collect.add(collate(batch, self.pad, self.device)) * len(batch)
            samples += len(batch)
            text = f"{collect.samples} of {len(rows)} samples"
            said = f", loss {loss / samples:.3f}" if set(self.options.statistics) - {"wanda", "gram"} else ""
            self.progress(role, number_ / len(batches) * 0.999, text + said)
            if time.monotonic() - saved > self.options.save_seconds and number_ < len(batches):
                _keep(collect, folder / UNFINISHED, key, number_)
                saved = time.monotonic()
        self.progress(role, 1.0, f"{collect.samples} samples, {collect.answer_tokens} answer tokens")

    def _key(self, rows: Sequence[Encoded]) -> str:
        """Of everything that the sums depend on."""
        o = self.options
        parts = [
            self.digest, str(self.dtype), sorted(o.statistics), o.batch, o.tokens, o.vocabulary,
            [(row.ids, row.prompt) for row in rows],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _keep(collect: Collect, file: Path, key: str, batches: int) -> None:
    """Write the state of a sum that is not finished."""
    state = collect.state_dict()
    plain = {name: value for name, value in state.items() if name != "sums"}
    write_tensors(file, state["sums"], {"key": key, "batches": str(batches), "state": json.dumps(plain)})


def _taken_up(collect: Collect, file: Path, key: str) -> int:
    """Load such a state where it is of the same sum; returns the batches that are in it."""
    if not file.is_file():
        return 0
    try:
        shard = Shard.open(file)
    except ValueError:
        return 0
    if shard.metadata.get("key") != key:
        return 0
    with open(file, "rb") as opened:
        found: dict[str, Tensor] = {t.name: as_tensor(t, read_bytes(opened, t)) for t in shard.tensors}
    device = next(collect.model.parameters()).device
    moved = {name: value.to(device) for name, value in found.items()}
    collect.load_state_dict({**json.loads(shard.metadata["state"]), "sums": moved})
    return int(shard.metadata["batches"])


def _load(tokenizer: PreTrainedTokenizerBase, role: str, given: str | SetConfig, options: Options) -> LoadedSet:
    config = given if isinstance(given, SetConfig) else SetConfig(path=str(given))
    if role == "safety" and config.path == PACKAGED and not config.refusals:  # requests, of which no answers are known
        config = SetConfig(path=PACKAGED, limit=config.limit, refusals=True)
    loaded = load_answered(tokenizer, role, config, options.prompt_tokens)
    if options.samples is not None:
        loaded.keep(loaded.items[: options.samples], "not needed")
    return loaded


def _encoded(tokenizer: PreTrainedTokenizerBase, loaded: LoadedSet, options: Options) -> list[Encoded]:
    made = [
        with_answer(tokenizer, item.ids, item.answers.get("answer") or sets.refusal(i), options.answer_tokens)
        for i, item in enumerate(loaded.items)
    ]
    loaded.cut = sum(is_cut(tokenizer, one) for one in made)
    return made


def _source(loaded: LoadedSet) -> DataSource:
    return loaded.source({"scored": Split(prompts=len(loaded.items), clusters=None)})


def _scores_folder(given: Path) -> Path:
    missing = [role for role in ROLES if not (given / role).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"scores: {str(given)!r} has no folder {missing[0]!r}; expected what `fastguard saliency --out` wrote"
        )
    return given


def _same_model(source: Folder, found: dict[str, Scores], given: Path) -> None:
    """Raise ValueError where the scores are those of another model."""
    digest = models.model_digest(source.path)
    for role, scores in found.items():
        of: Any = scores.about.get("model_sha256")
        if of != digest:
            raise ValueError(
                f"scores: those in {str(given / role)!r} are of {scores.about.get('model')!r} (sha256 {str(of)[:12]}), "
                f"expected those of {str(source.path)!r} (sha256 {digest[:12]})"
            )

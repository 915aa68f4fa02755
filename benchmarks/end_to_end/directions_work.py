"""What is measured of directions on SmolLM2 with the demo's prompts: the workloads and their contenders.

    python benchmarks/end_to_end/directions_work.py estimate bare fastguard published

prints a JSON line per contender with the peak memory above the model, each measured in a process of its own;
``bench_directions.py`` times them. The published procedure is the tests' plain form of it
(tests/directions/published.py), which is kinder than the published code in one thing: it slices the logits' last
position before it casts them to fp64.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import measure  # noqa: E402
from directions import published  # noqa: E402
from fastguard import directions, models  # noqa: E402
from fastguard.data.chat import Encoded  # noqa: E402
from fastguard.data.corpus import Corpus, build_corpus  # noqa: E402
from fastguard.run.config import DataConfig  # noqa: E402

PROMPTS, BATCH = 128, 32
"""Prompts of each class that estimate, and how many at a time: the published procedure's."""
VALIDATION = 4
"""Of each class that choose; 32 in the paper, which takes eight times as long."""
POSITIONS = 5
TOKENS = 32
"""That are generated."""

Batch = dict[str, Tensor]
Run = Callable[[], Any]


def load() -> tuple[Any, Corpus]:
    """SmolLM2-135M-Instruct in fp32, in evaluation mode, and the demo's corpus."""
    corpus = build_corpus(models.load_tokenizer(models.SMOLLM2, plain=True), DataConfig())
    return models.load_model(models.SMOLLM2, torch.float32).requires_grad_(False), corpus


def left_padded(rows: Sequence[Encoded], pad: int, size: int = BATCH) -> list[Batch]:
    """Prompts in batches, padded on the left, as the published procedure wants them; short ones beside short ones."""
    made = []
    rows = sorted(rows, key=lambda row: row.prompt)
    for some in (rows[i : i + size] for i in range(0, len(rows), size)):
        ids = torch.full((len(some), max(row.prompt for row in some)), pad)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(some):
            ids[at, -row.prompt :] = torch.tensor(row.ids[: row.prompt])
            mask[at, -row.prompt :] = 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def instructions(corpus: Corpus, count: int, start: int = 0) -> tuple[list[Batch], list[Batch]]:
    """Harmful and harmless ones; their answers are not read."""
    harmful = [*corpus.harmful["attack"], *corpus.harmful["immunize"]]
    harmless = corpus.harmless["immunize"]
    for name, rows in (("harmful", harmful), ("harmless", harmless)):
        if len(rows) < start + count:
            raise RuntimeError(f"{name}: the corpus has {len(rows)} prompts, and {start + count} are wanted")
    return (
        left_padded(harmful[start : start + count], corpus.pad),
        left_padded(harmless[start : start + count], corpus.pad),
    )


def refusal_tokens(corpus: Corpus) -> list[int]:
    """With which the corpus's refusals begin."""
    return sorted({row.ids[row.prompt] for row in corpus.safe["immunize"]})


# Estimation


def estimation(name: str, model: Any, harmful: list[Batch], harmless: list[Batch]) -> Run:
    """All layers, the last positions: ``fastguard``, ``published``, or the ``bare`` forwards without the head."""
    if name == "fastguard":
        return lambda: directions.estimate(model, harmful, harmless, positions=POSITIONS).difference

    def bare() -> None:
        with torch.no_grad():
            for batch in (*harmful, *harmless):
                model.model(**batch, use_cache=False)

    def plain() -> Tensor:
        at = list(range(-POSITIONS, 0))
        return published.mean_activations(model, harmful, at) - published.mean_activations(model, harmless, at)

    return {"bare": bare, "published": plain}[name]


def body_flops(model: Any, batches: Sequence[Batch], layers: int | None = None) -> int:
    """Of the matrix products of so many layers with weights; attention's own are left out."""
    each = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() > 1)
    count = len(model.model.layers) if layers is None else layers
    return 2 * each * count * sum(batch["input_ids"].numel() for batch in batches)


# Selection


Tables = tuple[Tensor, Tensor, Tensor]
"""Refusal scores, divergences and steering scores [P, L] of the candidates."""


def selection(
    name: str, model: Any, found: Any, harmful: list[Batch], harmless: list[Batch], tokens: list[int], **filters: float
) -> Callable[[], Any]:
    """``fastguard``: with ``filters``, gives a Selection. ``published``: three sweeps whatever the filters; Tables."""
    if name == "published":
        return lambda: published.selection(model, found.difference, harmful, harmless, tokens)[1:]
    return lambda: directions.select(model, found, harmful, harmless, refusal_tokens=tokens, **filters)


NO_FILTER = {"max_kl": math.inf, "min_steering": -math.inf}
"""All candidates below the layer bound are asked everything: the worst case."""


def below_the_bound(tables: Tables) -> Tensor:
    """Which candidates [P, L] the layer bound lets through, those without a direction left out."""
    refusal = tables[0]
    there = ~refusal.isnan()
    there[:, int(0.8 * refusal.shape[1]) :] = False
    return there


def half(tables: Tables) -> dict[str, float]:
    """Filters each of which lets half of what comes to it through."""
    _, kl, steering = tables
    there = below_the_bound(tables)
    least = float(steering[there].median())
    return {"max_kl": float(kl[there & (steering >= least)].median()) + 1e-9, "min_steering": least - 1e-9}


def chosen(tables: Tables, max_kl: float, min_steering: float) -> tuple[int, int]:
    """The published choice: row of the positions, and layer."""
    refusal, kl, steering = tables
    passed = below_the_bound(tables) & (kl <= max_kl) & (steering >= min_steering)
    at = int(torch.where(passed, refusal, math.inf).argmin())
    return at // refusal.shape[1], at % refusal.shape[1]


# Generation


def generation(model: Any, prompts: Batch) -> Callable[[], Tensor]:
    """Greedy, with cache, `TOKENS` new ones whatever comes out."""

    def run() -> Tensor:
        with torch.no_grad():
            return model.generate(  # type: ignore[no-any-return]
                **prompts, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )

    return run


# The streamed edit


def plain_copy(source: Path, target: Path, digest: Any = None) -> None:
    """A file read and written in portions until it is on the disk: the passes over the bytes that an edit has."""
    portion = bytearray(2**22)
    view = memoryview(portion)
    with open(source, "rb") as read, open(target, "wb") as written:
        while count := read.readinto(portion):
            written.write(view[:count])
            if digest is not None:
                digest.update(view[:count])
        written.flush()
        os.fsync(written.fileno())


def editing(name: str, basis: Tensor, folder: Path) -> Run:
    """A streamed ablation of the model's folder into ``folder``; a ``copy`` of its shards; a ``copy, SHA-256``."""
    from fastguard.edits.ablate import ablation
    from fastguard.edits.stream import source_folder, stream

    source = source_folder(models.SMOLLM2)
    out = folder / name

    def edit() -> Any:
        return stream(source, out, ablation(source, basis, keep_tied=True))

    def copy() -> None:
        out.mkdir()
        for shard in source.shards:
            plain_copy(shard.path, out / shard.path.name, hashlib.sha256() if "SHA" in name else None)

    def fresh() -> Any:
        shutil.rmtree(out, ignore_errors=True)
        return (copy if name.startswith("copy") else edit)()

    return fresh


# Memory


def peak_of(what: str, name: str) -> int:
    """Peak memory above the model; a batch of each class, since more of them add nothing."""
    model, corpus = load()
    if what == "estimate":
        harmful, harmless = instructions(corpus, BATCH, PROMPTS - BATCH)
        model(**{key: value[:1] for key, value in harmful[0].items()})  # what is allocated once
        return measure.peak_bytes(estimation(name, model, harmful, harmless))
    raise ValueError(f"what: expected estimate, got {what!r}")


def peak_in_fresh_process(what: str, name: str) -> int:
    """`peak_of` in a process of its own, which gives freed memory back to the system at once: what is live counts."""
    command = [sys.executable, __file__, what, name, "--here"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{out.stderr[-3000:]}")
    return int(json.loads(out.stdout.splitlines()[-1])["peak_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["estimate"])
    parser.add_argument("contenders", nargs="+")
    parser.add_argument("--here", action="store_true", help="in this process (one contender)")
    options = parser.parse_args()
    for name in options.contenders:
        peak = (peak_of if options.here else peak_in_fresh_process)(options.what, name)
        print(json.dumps({"contender": name, "peak_bytes": peak}))


if __name__ == "__main__":
    main()

"""``fastguard bench``: the arguments, parsed without typer, which a machine with a GPU need not have."""

from __future__ import annotations

import argparse
import datetime
import functools
from collections.abc import Sequence
from pathlib import Path


def main(given: Sequence[str] | None = None) -> int:
    """Run it; 0 where every op agrees with float64, 1 where one does not, 2 where nothing could be run."""
    parser = argparse.ArgumentParser(
        prog="fastguard bench",
        description="Check every op on the GPU against float64, and time it beside its peers at an 8B model's shapes.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpu", action="store_true", help="on the current CUDA device")
    where.add_argument("--rehearse", action="store_true", help="tiny, in Triton's interpreter: shows that it runs")
    where.add_argument("--record", metavar="MODEL", help="write a model's hidden states to OUT, for --states")
    parser.add_argument("--text", type=Path, help="what the recorded model reads: at least 8193 tokens of plain text")
    parser.add_argument("--states", type=Path, help="recorded hidden states, timed beside synthetic ones")
    parser.add_argument("--out", type=Path, help="folder of results.jsonl and table.md [default: runs/gpu-TIME]")
    parser.add_argument("--peers", type=Path, help="folder of wheels of libraries to compare with; nothing is fetched")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no more is begun [default: 8]")
    parser.add_argument(
        "--tune", type=float, nargs="?", const=10.0, default=0.0, metavar="MINUTES",
        help="first try block shapes of the matrix kernels, for so long [10], and write the table of the fastest",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="the check against float64 alone")
    options = parser.parse_args(given)
    from fastguard.bench.session import run
    from fastguard.bench.shapes import LLAMA_8B, REHEARSAL

    if options.record:
        from fastguard.bench import states

        if options.out is None or options.text is None:
            parser.error("--record: expected --text FILE and --out FILE.safetensors")
        try:
            states.record(options.record, options.text, options.out, LLAMA_8B.rows)
        except (OSError, ValueError) as error:
            parser.exit(2, f"fastguard bench: {error}\n")
        return 0
    shapes = REHEARSAL if options.rehearse else LLAMA_8B
    out = options.out or Path(f"runs/gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    try:
        say = functools.partial(print, flush=True)
        outcome = run(shapes, out, options.minutes, options.peers, options.check, say, options.tune, options.states)
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"fastguard bench: {error}\n")
    wrong = [op for op, said in outcome.checked.items() if said]
    print(f"{len(outcome.checked) - len(wrong)} of {len(outcome.checked)} ops agree with float64")
    if outcome.proof is not None:
        print(f"what agrees is chosen by default from now on: {outcome.proof}")
    print(f"table: {outcome.table}")
    return 1 if wrong else 0

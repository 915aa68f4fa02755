"""Runs the benchmarks and writes their results and tables.

    python benchmarks/run.py [--name NAME] [--methods NAME,NAME] [SELECTION ...]

The ops' own tests run first: no speed is reported on red tests. Results go to benchmarks/results/<name>.json with the
machine, versions and date; the tables of docs/performance.md between ``<!-- bench:<name> -->`` markers are rewritten
from them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
NESTED = "benchmarks/end_to_end/bench_nested_steps.py"
SALIENCY = [
    *(f"benchmarks/bench_{op}.py" for op in ("abs_weight_grad", "column_norms", "gram", "threshold_select")),
    "benchmarks/end_to_end/bench_saliency.py",
    "benchmarks/end_to_end/bench_merging.py",
]
KEPT_STATS = ("min", "median", "max", "rounds")


def pytest(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


def measured(selection: list[str]) -> dict[str, Any]:
    """The trimmed report of one pytest-benchmark run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = pytest(
            "-o", "python_files=bench_*.py", "-o", "pythonpath=benchmarks", "-o", "timeout=3000", "--benchmark-only",
            f"--benchmark-json={report}", "--benchmark-columns=min,median,rounds", *selection,
        )  # fmt: skip
        if code or not report.exists():
            raise SystemExit(f"the benchmarks failed (pytest exit {code}); results are left as they were")
        full = json.loads(report.read_text())
    keep = ("cpu", "capability", "gpu", "threads", "torch", "triton", "python")
    return {
        "date": full["datetime"][:10],
        "machine": {k: full["machine_info"].get(k) for k in keep},
        "commit": full["commit_info"].get("id", "")[:10],
        "benchmarks": [entry for b in full["benchmarks"] for entry in entries(b)],
    }


def entries(benchmark: dict[str, Any]) -> list[dict[str, Any]]:
    """What is kept of a benchmark: the contender that was timed, after those it found times for ``beside`` it."""
    extra = dict(benchmark["extra_info"])
    beside = extra.pop("beside", [])
    timed = {
        "contender": benchmark["params"]["name"],
        "seconds": {k: benchmark["stats"][k] for k in KEPT_STATS},
        **extra,
    }
    return [{"group": benchmark["group"], **entry} for entry in (*beside, timed)]


def milliseconds(seconds: float) -> str:
    """Two digits at least."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2g}"


def table(result: dict[str, Any]) -> str:
    """Markdown: a table a group, the machine and date above."""
    m = result["machine"]
    where = m["gpu"] or f"{m['cpu']} ({m['capability']}), {m['threads']} threads"
    lines = [f"{where}; torch {m['torch']}, Python {m['python']}; {result['date']}, commit {result['commit']}.", ""]
    groups: dict[str, list[dict[str, Any]]] = {}
    for b in result["benchmarks"]:
        groups.setdefault(b["group"], []).append(b)
    for group, rows in groups.items():
        lines += [f"**{group}**", "", *contenders(rows), ""]
        for r in rows:
            if "left_out" in r:
                lines += [f"Left out: {r['left_out']}.", ""]
            if "parts" in r:
                lines += [f"What {r['contender']}'s step does besides model passes:", "", *parts(r), ""]
    return "\n".join(lines)


RATES = {
    "fraction_of_gemm_rate": "of the GEMM rate",
    "fraction_of_bandwidth": "of the bandwidth",
    "fraction_of_floor": "of the plainest passes",
}


def contenders(rows: list[dict[str, Any]]) -> list[str]:
    """A line a contender; columns that no row has are left out."""
    base = next((r for r in rows if r["contender"] in ("plain", "eager")), rows[0])
    columns: dict[str, list[str]] = {
        "": [r["contender"] for r in rows],
        "median ms": [milliseconds(r["seconds"]["median"]) for r in rows],
        "ratio": [f"{r.get('ratio_to_plain', r['seconds']['median'] / base['seconds']['median']):.2f}" for r in rows],
        "peak MB": [f"{r['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in r else "" for r in rows],
        "bound MB": [f"{r['bound_bytes'] / 1e6:,.0f}" if "bound_bytes" in r else "" for r in rows],
        **{title: [format(r[key], ".0%") if key in r else "" for r in rows] for key, title in RATES.items()},
        "gradient error": [format(max(errors), ".1e") if (errors := gradient_errors(r)) else "" for r in rows],
    }
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    return [
        markdown(list(shown)),
        "|---" * len(shown) + "|",
        *map(markdown, map(list, zip(*shown.values(), strict=True))),
    ]


def gradient_errors(row: dict[str, Any]) -> list[float]:
    """The relative errors of a contender's gradients."""
    return [row["worst_gradient_error"]] if "worst_gradient_error" in row else row.get("gradient_error", [])


def parts(result: dict[str, Any]) -> list[str]:
    """A line for everything in a step that is not a model pass, and how long torch's copy would take for its bytes."""
    head = ["part", "ms", "of the step", "MB", "ms at a copy's rate"]
    lines, step = [markdown(head), "|---" * len(head) + "|"], result["seconds"]["median"]
    for p in result["parts"]:
        moved = [f"{p['bytes'] / 1e6:,.0f}", f"{1e3 * p['copy_seconds']:,.1f}"] if p["bytes"] else ["", ""]
        lines.append(markdown([p["part"], f"{1e3 * p['seconds']:,.1f}", f"{p['seconds'] / step:.1%}", *moved]))
    return lines


def markdown(cells: list[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def write_tables() -> None:
    """Put every result's table between its markers in docs/performance.md."""
    page = PAGE.read_text(encoding="utf-8")
    for file in sorted(RESULTS.glob("*.json")):
        begin, end = f"<!-- bench:{file.stem} -->", f"<!-- /bench:{file.stem} -->"
        if begin in page:
            head, rest = page.split(begin, 1)
            page = f"{head}{begin}\n{table(json.loads(file.read_text()))}{end}{rest.split(end, 1)[1]}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("selection", nargs="*", help="pytest arguments instead of all benchmarks")
    parser.add_argument(
        "--name",
        help="the one result that is measured, of a selection the name of its file: cpu-ops, cpu-step, cpu-nested, "
        "cpu-attackers, cpu-persistent, cpu-directions, cpu-saliency",
    )
    parser.add_argument("--methods", help="defenses whose steps are timed, by comma (bench_nested_steps.py)")
    parser.add_argument("--tables-only", action="store_true", help="rewrite docs/performance.md from the results")
    options = parser.parse_args()
    if not options.tables_only:
        if pytest("-x", "tests/ops"):
            raise SystemExit("the ops' tests fail: nothing is timed")
        jobs = {
            "cpu-ops": [str(p.relative_to(ROOT)) for p in sorted((ROOT / "benchmarks").glob("bench_*.py"))
                        if str(p.relative_to(ROOT)) not in SALIENCY],
            "cpu-step": ["benchmarks/end_to_end/bench_repnoise_step.py"],
            "cpu-nested": [NESTED],
            "cpu-attackers": ["benchmarks/end_to_end/bench_attackers.py"],
            "cpu-persistent": ["benchmarks/end_to_end/bench_persistent.py"],
            "cpu-directions": ["benchmarks/end_to_end/bench_directions.py"],
            "cpu-saliency": SALIENCY,
        }  # fmt: skip
        if options.selection:
            jobs = {options.name or "selection": options.selection}
        elif options.name is not None:
            if options.name not in jobs:
                parser.error(f"--name: expected one of {', '.join(jobs)} or a selection, got {options.name!r}")
            jobs = {options.name: jobs[options.name]}
        if options.methods:
            jobs = {name: [*s, f"--methods={options.methods}"] for name, s in jobs.items() if NESTED in s}
            if not jobs:
                parser.error(f"--methods: expected {NESTED} in the selection, or none")
        RESULTS.mkdir(exist_ok=True)
        for name, selection in jobs.items():
            file = RESULTS / f"{name}.json"
            text = json.dumps(measured(selection), indent=1) + "\n"
            file.with_suffix(".tmp").write_text(text)
            file.with_suffix(".tmp").rename(file)
    write_tables()


if __name__ == "__main__":
    main()

"""The command line: ``fastguard doctor | demo | immunize | report``.

Nothing heavy is imported before a command needs it, so that ``fastguard --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

try:
    import typer
except ImportError:
    sys.exit("fastguard: the command line needs further packages: pip install 'fastguard[hf,report]'")

if TYPE_CHECKING:
    from fastguard.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Immunize open-weight language models against harmful fine-tuning, and measure what it bought.",
)

Quick = Annotated[bool, typer.Option("--quick", help="Small enough for a test machine: shows that it runs, no more.")]


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Show what this machine offers and which backend serves which op, and why."""
    import json

    from fastguard import doctor

    found = doctor.examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        doctor.show(found)


@app.command()
def demo(
    quick: Quick = False,
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that was interrupted is taken up.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[
        int | None, typer.Option(help="Other data splits, batches and attack; for a second opinion.")
    ] = None,
) -> None:
    """Align, immunize and attack SmolLM2-135M-Instruct beside a control, and report."""
    from fastguard import config

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes out of an installed package
    chosen = config.load("demo")
    _run(chosen if seed is None else config.seeded(chosen, seed), out, quick)


@app.command()
def immunize(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml", help="A file, or a packaged one: demo, ablation, tar, booster, vaccine, t_vaccine."
        ),
    ],
    quick: Quick = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/NAME-OF-CONFIG]")] = None,
) -> None:
    """Run the pipeline on the model and the settings of a configuration file, and report."""
    from fastguard.config import load

    try:
        chosen = load(config)
    except (FileNotFoundError, ValueError) as error:
        _fail(error)
    _run(chosen, out or Path("runs") / config.stem, quick)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A folder that holds metrics.json.")],
    table: Annotated[Path | None, typer.Option(help="Also write the comparison as a Markdown table here.")] = None,
) -> None:
    """Write RUN_DIR/report.html from RUN_DIR/metrics.json."""
    from fastguard.evaluation.report import load, markdown, write

    try:
        typer.echo(f"report: {write(run_dir)}")
        if table is not None:
            table.write_text(markdown(load(run_dir)), encoding="utf-8")
            typer.echo(f"table:  {table}")
    except (FileNotFoundError, ValueError) as error:
        _fail(error)


def _run(config: Config, out: Path, quick: bool) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would write across the bars of the stages
    from fastguard import pipeline
    from fastguard.evaluation.report import summary, write
    from fastguard.progress import rich_progress

    try:
        with rich_progress() as progress:
            metrics = pipeline.run(config, out, quick, progress)
    except ModuleNotFoundError as error:  # a data package or transformers is missing; the message says which
        _fail(error)
    typer.echo(summary(metrics))
    typer.echo(f"report: {write(out)}\nmodel:  {out / 'immunized'}")


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"fastguard: {error}", err=True)
    raise typer.Exit(2) from None


def main() -> None:
    """Entry point of the ``fastguard`` script."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that spin while they wait are ten times slower where another process uses a core. The OpenMP
        # runtime reads this once, when torch is loaded: if something has loaded torch already, start over.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if "torch" in sys.modules:
            os.execv(sys.executable, [sys.executable, "-m", "fastguard.cli", *sys.argv[1:]])
    app()


if __name__ == "__main__":
    main()

"""The command line: ``fastguard doctor | demo | immunize | report | plan``.

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
    from fastguard.run.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Immunize open-weight language models against harmful fine-tuning, and measure what it bought.",
)

Quick = Annotated[bool, typer.Option("--quick", help="Small enough for a test machine: shows that it runs, no more.")]


def _planned() -> str:
    """The defenses that ``plan`` knows, for its help; a package that announces one badly is named when it is used."""
    from fastguard.plan.command import known

    try:
        return ", ".join(known())
    except ValueError:
        return "those of the registry"


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
    from fastguard.run import config

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
    from fastguard.run.config import load

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


@app.command()
def plan(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Names (llama-3-8b), folders, config.json files or fastguard's YAML."),
    ],
    defense: Annotated[str | None, typer.Option(help=f"One of {_planned()}; otherwise all.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of the defense, as --set inner_steps=8; repeatable."
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs, over all of which FSDP2 shards the model.")] = 64,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100-80g or b200.")] = "h100",
    batch: Annotated[int, typer.Option(help="Sequences a GPU, of every batch that a step reads.")] = 8,
    tokens: Annotated[int, typer.Option(help="Length of a sequence.")] = 2048,
    steps: Annotated[int | None, typer.Option(help="Steps of the run; otherwise the defense's own.")] = None,
    dtype: Annotated[str, typer.Option(help="mixed (fp32 masters, bf16 products), bf16 or fp32.")] = "mixed",
    checkpointing: Annotated[bool, typer.Option(help="Keep a layer's input alone and compute the layer again.")] = True,
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Train adapters of this rank only.")] = None,
    snapshot: Annotated[str, typer.Option(help="Where weights wait during an attack: device or host.")] = "device",
    efficiency: Annotated[str, typer.Option(help="What of each peak a program gets, as matmul=0.5,network=0.6.")] = "",
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write one JSON document instead of tables.")
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(metavar="FILE|-", help="Write every defense as one Markdown table, between FILE's markers."),
    ] = None,
) -> None:
    """Estimate memory, work and time of a defense on many GPUs, here and as published. Nothing is run."""
    from fastguard.plan import command

    job = {
        "gpus": gpus, "batch": batch, "tokens": tokens, "checkpointing": checkpointing, "lora": lora,
        "snapshot": snapshot, **({} if steps is None else {"steps": steps}),
    }  # fmt: skip
    try:
        found = command.plans(models, defense, gpu, dtype, efficiency, job, command.assignments(settings or ()))
        if table is not None:
            typer.echo(command.write_table(found, table))
        elif as_json is not None:
            typer.echo(command.write_json(found, as_json))
        else:
            command.print_tables(found)
    except (FileNotFoundError, ValueError) as error:
        _fail(error)


def _run(config: Config, out: Path, quick: bool) -> None:
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # they would write across the bars of the stages
        os.environ.setdefault(bars, "1")
    from fastguard.run import pipeline
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

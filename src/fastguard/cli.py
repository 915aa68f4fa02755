"""The command line, ``fastguard``: run, measure and report; directions, saliency and what edits weights; the planner.

Nothing heavy is imported before a command needs it, so that ``fastguard --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

try:
    import typer
except ImportError:
    sys.exit("fastguard: the command line needs further packages: pip install 'fastguard-kernels[hf,report]'")

from fastguard.merging.command import merge
from fastguard.methods import attacks
from fastguard.run.config import packaged

if TYPE_CHECKING:
    from fastguard.evaluation.metrics import Metrics
    from fastguard.progress import Progress
    from fastguard.run.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Immunize open-weight language models against harmful fine-tuning, and measure what it bought.",
)


def _version(asked: bool) -> None:
    if asked:
        from fastguard import __version__

        typer.echo(f"fastguard {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Only declares the option; app.help is what --help shows."""


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


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Check every op on the GPU against float64, and time it beside its peers (bench --help)."""
    from fastguard.bench import command  # its own parser: a machine with a GPU need not have typer

    raise typer.Exit(command.main(context.args))


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
            metavar="CONFIG.yaml", help=f"A file, or a packaged one: {', '.join(packaged()).replace('quick, ', '')}."
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


Models = Annotated[
    list[str], typer.Argument(metavar="[NAME=]MODEL...", help="Folders or ids; NAME is what the report calls it.")
]
Settings = Annotated[
    Path,
    typer.Option("--config", help="Data, attack and evaluation; a file or a packaged one.", metavar="FILE"),
]
Out = Annotated[Path, typer.Option(help="Folder of the run; a run that was interrupted is taken up.")]


@app.command()
def attack(
    models: Models,
    config: Settings = Path("demo"),
    method: Annotated[str | None, typer.Option(help=f"{', '.join(attacks())}. [default: as configured]")] = None,
    quick: Quick = False,
    out: Out = Path("runs/attack"),
) -> None:
    """Attack models made anywhere, on fresh copies, and report how many steps it took."""
    _examine(models, config, method, quick, out, {"evaluate": {"run": False}})


@app.command()
def evaluate(
    models: Models,
    config: Settings = Path("demo"),
    method: Annotated[str | None, typer.Option(help=f"{', '.join(attacks())}. [default: as configured]")] = None,
    attacked: Annotated[bool, typer.Option("--attack/--no-attack", help="Attack them too.")] = True,
    quick: Quick = False,
    out: Out = Path("runs/evaluate"),
) -> None:
    """Measure what models made anywhere are worth, attack them, and report them side by side."""
    _examine(models, config, method, quick, out, {"attack": {"run": attacked}})


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, a Trainer's checkpoint, sharded or not.")],
    model: Annotated[
        str | None,
        typer.Option(help="What the run began with: a folder or an id. [default: CHECKPOINT alone]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("converted"),
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: as it is]")] = None,
    merge: Annotated[bool, typer.Option(help="Add adapters to their weights.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it is there.")] = False,
) -> None:
    """Write any training checkpoint as a folder that from_pretrained loads."""
    kinds = ("float32", "bfloat16", "float16", "float64")
    if dtype is not None and dtype not in kinds:
        _fail(ValueError(f"--dtype: expected one of {', '.join(kinds)}, got {dtype!r}"))
    import torch

    from fastguard.trainers import to_huggingface

    try:
        chosen = None if dtype is None else getattr(torch, dtype)
        typer.echo(str(to_huggingface(checkpoint, model, out, dtype=chosen, merge=merge, overwrite=overwrite)))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        _fail(error)


@app.command()
def directions(
    model: Annotated[str, typer.Argument(help="A folder or an id of a chat model, or smollm2.")],
    harmful: Annotated[
        str,
        typer.Option(metavar="FILE", help="Prompts that should be refused: jsonl, json, csv, txt, parquet, Hub id."),
    ],
    harmless: Annotated[str, typer.Option(metavar="FILE", help="Ordinary prompts; both: or `packaged`.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    harmful_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the harmful prompts.")] = "prompt",
    harmless_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the harmless prompts.")] = "prompt",
    positions: Annotated[
        int | None, typer.Option(help="Last tokens of a prompt to read. [default: those that all prompts end with]")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(help="Prompts of each set that choose. [default: 32, at most a quarter]")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(help="Prompts of each set that measure. [default: 100, at most a quarter]")
    ] = None,
    count: Annotated[int, typer.Option(help="Directions; each after the first is found without those before.")] = 1,
    refusal_tokens: Annotated[
        str, typer.Option(metavar="A,B", help="Words or ids with which refusals begin. [default: the model's own]")
    ] = "",
    max_kl: Annotated[float, typer.Option(help="How much harmless prompts may change without the direction.")] = 0.1,
    min_steering: Annotated[float, typer.Option(help="Least refusal score of harmless prompts with it added.")] = 0.0,
    batch: Annotated[int, typer.Option(help="Prompts in one forward.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are dropped.")] = 512,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    chat_template: Annotated[str, typer.Option(help="model: its own; plain: ChatML without system prompt.")] = "model",
    seed: Annotated[int, typer.Option(help="Of the division of the prompts.")] = 0,
    report: Annotated[bool, typer.Option(help="Write a page with pictures beside the file.")] = True,
) -> None:
    """Find a model's refusal direction, and show where it is and how it was chosen; to measure a defense by."""
    _quiet()
    from fastguard.data.options import Columns, SetConfig
    from fastguard.data.sources import describe
    from fastguard.evaluation.directions import summary, write
    from fastguard.progress import rich_progress
    from fastguard.run.directions import Options, find, save

    try:
        if out.suffix != ".safetensors" or out.is_dir():
            raise ValueError(f"--out: expected a file named .safetensors, got {str(out)!r}")
        options = Options(
            positions=positions, validation=validation, held_out=held_out, count=count, max_kl=max_kl,
            refusal_tokens=tuple(word for word in refusal_tokens.split(",") if word.strip()),
            min_steering=min_steering, batch=batch, prompt_tokens=prompt_tokens, dtype=dtype, device=device,
            chat_template=chat_template, seed=seed,
        )  # fmt: skip
        bad = SetConfig(path=harmful, columns=Columns(prompt=harmful_column))
        good = SetConfig(path=harmless, columns=Columns(prompt=harmless_column))
        with rich_progress() as progress:
            found = find(model, bad, good, options, progress)
        save(found, out)
        for line in describe(dict(found.sources)):
            typer.echo(line)
        typer.echo(summary(found))
        typer.echo(f"directions: {out}")
        if report:
            typer.echo(f"report: {write(found, out.with_suffix('.html'))}")
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)


@app.command()
def ablate(
    model: Annotated[str, typer.Argument(help="A folder or an id, with its weights in safetensors.")],
    directions: Annotated[
        Path, typer.Option(metavar="FILE", help="What to cut out, as `fastguard directions` has it.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; one that was interrupted is taken up.")] = Path(
        "ablated"
    ),
    form: Annotated[str, typer.Option(help="orthogonal, norm_columns or norm_rows.")] = "orthogonal",
    keep_tied: Annotated[bool, typer.Option("--keep-tied", help="Leave a tied head tied; it is edited, too.")] = False,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Write an adapter for PEFT instead of the weights.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it holds something else.")] = False,
) -> None:
    """Cut directions out of a model's weights, shard by shard: what an attacker does, to measure a defense by."""
    from fastguard.edits.basis import read_basis
    from fastguard.progress import rich_progress

    try:
        if lora is not None and keep_tied:
            raise ValueError("--keep-tied: an adapter sits on the embedding alone; expected it without --lora")
        basis = read_basis(directions)
        with rich_progress() as progress:
            if lora is None:
                from fastguard.edits import source_folder, stream
                from fastguard.edits.ablate import ablation

                source = source_folder(model)
                done = stream(
                    source, out, ablation(source, basis, form, keep_tied=keep_tied), name=model, overwrite=overwrite,
                    progress=progress,
                )  # fmt: skip
                said = f", {done.kept} of {done.shards} shards were there" if done.kept else ""
                text = f"{done.folder} ({done.edited} tensors edited{said})"
            else:
                from fastguard.edits.adapter import adapter

                made = adapter(model, out, basis, form, rank=lora, overwrite=overwrite, progress=progress)
                worst = max(made.errors.values())
                text = f"{made.folder} (adapters of rank {made.rank}, largest relative error {worst:.2g})"
        typer.echo(f"model:  {text}")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        _fail(error)


app.command()(merge)


@app.command()
def saliency(
    model: Annotated[str, typer.Argument(help="A folder or an id of a chat model, or smollm2.")],
    safety: Annotated[
        str,
        typer.Option(metavar="FILE", help="Prompts with safe answers: jsonl, json, csv, parquet, Hub id, `packaged`."),
    ],
    utility: Annotated[str, typer.Option(metavar="FILE", help="Ordinary prompts with answers; or `packaged`.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores; a run that was interrupted is taken up.")],
    statistics: Annotated[
        str, typer.Option(metavar="A,B", help="snip, fisher, signed (of gradients), wanda, gram (of inputs).")
    ] = "snip,wanda",
    refusals: Annotated[
        bool, typer.Option("--refusals", help="Answers of the safety set are packaged refusals, whatever it holds.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Of each set, the first; 0: all.")] = 128,
    batch: Annotated[int, typer.Option(help="Conversations in one forward and backward.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are dropped.")] = 512,
    answer_tokens: Annotated[int, typer.Option(help="Longer answers are cut.")] = 512,
    tokens: Annotated[str, typer.Option(help="answer or all: tokens that wanda and gram are of.")] = "answer",
    vocabulary: Annotated[bool, typer.Option("--vocabulary", help="Score embedding and head, too.")] = False,
    score: Annotated[str, typer.Option(help="That the page shows: snip, fisher, wanda or magnitude.")] = "snip",
    safety_top: Annotated[
        float, typer.Option(help="Share of each matrix that counts as safety's, on the page.")
    ] = 0.05,
    utility_top: Annotated[float, typer.Option(help="Share of each matrix that counts as utility's.")] = 0.05,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    chat_template: Annotated[str, typer.Option(help="model: its own; plain: ChatML without system prompt.")] = "model",
    report: Annotated[bool, typer.Option(help="Write a page with pictures into the folder.")] = True,
) -> None:
    """Score every weight on safe answers and on ordinary ones, and show what only safety rests on."""
    _quiet()
    from fastguard.data.options import SetConfig
    from fastguard.data.sources import describe
    from fastguard.evaluation.saliency import summary, write
    from fastguard.progress import rich_progress
    from fastguard.run.saliency import Options, measure

    try:
        options = Options(
            statistics=tuple(name for name in statistics.replace(" ", "").split(",") if name), samples=samples or None,
            batch=batch, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, tokens=tokens,
            vocabulary=vocabulary, score=score, safety_top=safety_top, utility_top=utility_top, dtype=dtype,
            device=device, chat_template=chat_template,
        )  # fmt: skip
        with rich_progress() as progress:
            found = measure(model, SetConfig(path=safety, refusals=refusals), utility, out, options, progress)
        for line in describe(dict(found.sources)):
            typer.echo(line)
        typer.echo(summary(found))
        typer.echo(f"scores: {out}")
        if report:
            typer.echo(f"report: {write(found, out / 'saliency.html')}")
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A folder or an id, with its weights in safetensors.")],
    scores: Annotated[Path, typer.Option(metavar="DIR", help="What `fastguard saliency --out` wrote.")],
    safety_top: Annotated[float, typer.Option(metavar="Q", help="Top share for safety, of each matrix.")],
    utility_top: Annotated[float, typer.Option(metavar="P", help="Without this top share for utility; 0: with it.")],
    out: Annotated[Path, typer.Option(help="The folder to write; one that was interrupted is taken up.")],
    score: Annotated[str, typer.Option(help="snip, fisher, wanda or magnitude.")] = "snip",
    per: Annotated[str, typer.Option(help="What the shares are of: tensor, row or model.")] = "tensor",
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Put its weights there. [default: zeros]")] = None,
    random: Annotated[
        int | None, typer.Option(metavar="SEED", help="As many entries of each weight, drawn: to compare with.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it holds something else.")] = False,
) -> None:
    """Set to 0 what safety rests on and utility does not, shard by shard; to measure how sparse safety is."""
    from fastguard.progress import rich_progress
    from fastguard.run.saliency import prune as run

    try:
        with rich_progress() as progress:
            done = run(
                model, scores, out, safety_top, utility_top, score=score, per=per, base=base, random=random,
                overwrite=overwrite, progress=progress,
            )  # fmt: skip
        share = 100 * done.entries / done.scored
        typer.echo(f"model:  {done.streamed.folder} ({done.entries} of {done.scored} entries pruned, {share:.3g}%)")
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        _fail(error)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders that hold metrics.json.")],
    table: Annotated[Path | None, typer.Option(help="Also write the comparison as a Markdown table here.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Of several runs: the page to write. [default: comparison.html in the first]")
    ] = None,
) -> None:
    """Write RUN_DIR/report.html from RUN_DIR/metrics.json; of several runs one page that compares them."""
    from fastguard.evaluation.report import combined, load, markdown, write, write_page

    try:
        metrics = load(run_dirs[0]) if len(run_dirs) == 1 else combined({str(d): load(d) for d in run_dirs})
        if len(run_dirs) == 1 and out is None:
            typer.echo(f"report: {write(run_dirs[0])}")
        else:
            typer.echo(f"report: {write_page(metrics, out or run_dirs[0] / 'comparison.html')}")
        if table is not None:
            table.write_text(markdown(metrics), encoding="utf-8")
            typer.echo(f"table:  {table}")
    except (OSError, ValueError) as error:
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
    global_batch: Annotated[
        int | None, typer.Option(help="Sequences of every batch that a step reads, over all GPUs; else as published.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Length of a sequence; otherwise as published.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of an epoch; otherwise as published.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Times through them; otherwise as published.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run, instead of samples and epochs.")] = None,
    dtype: Annotated[str, typer.Option(help="mixed (fp32 masters, bf16 products), bf16 or fp32.")] = "mixed",
    checkpointing: Annotated[bool, typer.Option(help="Keep a layer's input alone and compute the layer again.")] = True,
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Train adapters of this rank only.")] = None,
    micro: Annotated[
        int | None, typer.Option(help="Sequences a GPU takes at a time; otherwise as many as fit, all if they do.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="LEVER", help="Leave an exact lever as it is: late_head, own_groups...; repeatable."),
    ] = None,
    deviations: Annotated[
        list[str] | None,
        typer.Option(
            "--deviation", metavar="NAME[+NAME]", help="Plan this deviation, or several at once; otherwise each alone."
        ),
    ] = None,
    adversary_rank: Annotated[int, typer.Option(metavar="RANK", help="Of attackers who train adapters.")] = 16,
    fresh: Annotated[int, typer.Option(help="Steps that an attacker who is kept goes further at a time.")] = 8,
    efficiency: Annotated[str, typer.Option(help="What of each peak a program gets, as matmul=0.5,network=0.6.")] = "",
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write one JSON document instead of tables.")
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(metavar="FILE|-", help="Write every defense as one Markdown table, between FILE's markers."),
    ] = None,
) -> None:
    """Estimate what a defense needs on many GPUs: as published, exact, and with named deviations. Nothing is run."""
    from fastguard.plan import command

    job = {
        "gpus": gpus, "global_batch": global_batch, "tokens": tokens, "samples": samples, "epochs": epochs,
        "steps": steps, "checkpointing": checkpointing, "lora": lora, "micro": micro, "adversary_rank": adversary_rank,
        "fresh": fresh,
    }  # fmt: skip
    try:
        found = command.plans(
            models, defense, gpu, dtype, efficiency, job, command.assignments(settings or ()), without=without or (),
            deviations=deviations,
        )  # fmt: skip
        if table is not None:
            typer.echo(command.write_table(found, table))
        elif as_json is not None:
            typer.echo(command.write_json(found, as_json))
        else:
            command.print_tables(found)
    except (FileNotFoundError, ValueError) as error:
        _fail(error)


def _run(config: Config, out: Path, quick: bool) -> None:
    from fastguard.run import pipeline

    model = f"model:  {out / 'immunized'}" if config.immunize.run else ""
    _reported(lambda progress: pipeline.run(config, out, quick, progress), out, model)


def _examine(
    models: list[str], config: Path, method: str | None, quick: bool, out: Path, changes: dict[str, dict[str, object]]
) -> None:
    from fastguard.run import config as configuration
    from fastguard.run import pipeline

    try:
        tree = configuration.load(config).to_dict()
        for section, values in changes.items():
            tree[section] = {**tree[section], **values}
        if method is not None and method != tree["attack"]["method"]:
            tree["attack"] = {**tree["attack"], "method": method, "options": {}}
        if method is not None:
            tree["attacks"] = {}  # this one alone
        tree["title"] = "Models made elsewhere"
        chosen = configuration.from_dict(tree, "--config")
    except (OSError, ValueError) as error:
        _fail(error)
    given: dict[str, str] = {}
    for text in models:
        name, _, source = text.rpartition("=")
        name = name or Path(source).name or source
        if name in given:
            _fail(ValueError(f"MODEL: two models are called {name!r}; give them names: NAME=MODEL"))
        given[name] = source
    _reported(lambda progress: pipeline.examine(given, chosen, out, quick, progress), out)


def _reported(work: Callable[[Progress], Metrics], out: Path, more: str = "") -> None:
    """Run with bars, print the result and write the report; what a user can mend ends with a line, not a traceback.

    Of several processes (torchrun, srun) the first one prints, and writes the report.
    """
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # they would write across the bars of the stages
        os.environ.setdefault(bars, "1")
    from fastguard import parallel
    from fastguard.evaluation.report import summary, write
    from fastguard.progress import rich_progress, silent
    from fastguard.run.keep import Stopped, stoppable

    try:
        with parallel.joined(), stoppable():
            if parallel.is_first():
                with rich_progress() as progress:
                    metrics = work(progress)
                typer.echo(summary(metrics))
                typer.echo(f"report: {write(out)}")
                if more:
                    typer.echo(more)
            else:
                work(silent)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"fastguard: {stopped}. The same command goes on from there", err=True)
        raise typer.Exit(143) from None  # as a process that SIGTERM ended
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)


def _quiet() -> None:
    """Keep other packages' progress bars from writing across this one's."""
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(bars, "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def _fail(error: Exception) -> NoReturn:
    if os.environ.get("FASTGUARD_TRACEBACK") == "1":
        raise error
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

"""``fastguard merge``: a method by name, or mergekit's YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastguard.merging.options import OPTIONS

if TYPE_CHECKING:
    from fastguard.merging import Merged, Model


def merge(
    method: Annotated[
        str, typer.Argument(metavar="METHOD|CONFIG.yaml", help=f"{', '.join(OPTIONS)}; or a file of mergekit's.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; one that was interrupted is taken up.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL[=WEIGHT]", help="A folder or an id; repeatable."),
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="What the models were made from.")] = None,
    aligned: Annotated[str | None, typer.Option(metavar="MODEL", help="resta, safe_lora: the safe one.")] = None,
    unaligned: Annotated[str | None, typer.Option(metavar="MODEL", help="resta: it without its safety.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the method, as --set gamma=0.5; repeatable."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: as the first is stored]")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it holds something else.")] = False,
) -> None:
    """Merge models on disk, shard by shard: to give a fine-tuned model its safety back, or as mergekit does."""
    from fastguard.merging import from_recipe
    from fastguard.merging import merge as merge_models
    from fastguard.plan.command import assignments
    from fastguard.progress import rich_progress

    try:
        with rich_progress() as progress:
            if method.endswith((".yaml", ".yml")):
                told = {"--model": models, "--base": base, "--aligned": aligned, "--unaligned": unaligned,
                        "--set": settings, "--dtype": dtype}  # fmt: skip
                if given := [name for name, value in told.items() if value]:
                    raise ValueError(f"{given[0]}: expected it in {method}, which says what is merged")
                done = from_recipe(method, out, overwrite=overwrite, progress=progress)
            else:
                done = merge_models(
                    method, [_model(text) for text in models or ()], out, base=base, aligned=aligned,
                    unaligned=unaligned, options=assignments(settings or ()), dtype=dtype, overwrite=overwrite,
                    progress=progress,
                )  # fmt: skip
        typer.echo(f"model:  {_said(done)}")
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if os.environ.get("FASTGUARD_TRACEBACK") == "1":
            raise
        typer.echo(f"fastguard: {error}", err=True)
        raise typer.Exit(2) from None


def _said(done: Merged) -> str:
    written = done.written
    kept = f", {written.kept} of {written.shards} shards were there" if written.kept else ""
    projected = f", {len(done.projected)} of {len(done.cosines)} modules projected" if done.cosines else ""
    return f"{written.folder} ({written.edited} tensors merged{projected}{kept})"


def _model(text: str) -> Model:
    from fastguard.merging import Model

    name, equals, weight = text.rpartition("=")
    if not equals:
        return Model(text)
    try:
        return Model(name, float(weight))
    except ValueError:
        raise ValueError(f"--model: expected a number behind =, got {text!r}") from None

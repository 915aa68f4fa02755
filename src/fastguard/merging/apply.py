"""Merge models on disk, in the memory of one tensor a model, into a folder that ``from_pretrained`` loads.

    merge("resta", "finetuned", "realigned", aligned="chat", unaligned="harmful", options={"gamma": 0.5})
    merge("ties", [Model("a", weight=0.5, density=0.3), Model("b")], "merged", base="base")

What `edits.stream` promises holds: whole shards or none, taken up after a kill, the origin on record and in the card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard import settings
from fastguard.edits.shards import DTYPES, is_adapter
from fastguard.edits.stream import Beside, Edit, Streamed, stream
from fastguard.merging.arithmetic import wide
from fastguard.merging.inputs import Model, fitted, opened
from fastguard.merging.methods import METHODS, Job, Method
from fastguard.merging.options import OPTIONS, SafeLora, Somf
from fastguard.merging.parameters import layers_of
from fastguard.merging.safe_lora import chosen, cosine, projection
from fastguard.merging.somf import Logits
from fastguard.progress import Progress, silent
from fastguard.settings import Settings

VERSION = 1
"""Of the arithmetic: shards of another are done again."""
ALIASES = {"lambda": "scale"}
"""mergekit's names of options that Python keeps for itself."""
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
ROLES = ("base", "aligned", "unaligned")
TRANSPOSED = ("gpt2", "openai-gpt")
"""Whose matrices are stored [d_in, d_out]."""


@dataclass(frozen=True)
class Merged:
    """What was written; of ``safe_lora`` each module's cosine of change and projection, and which were projected."""

    written: Streamed
    cosines: Mapping[str, float] = field(default_factory=dict)
    projected: tuple[str, ...] = ()


def merge(
    method: str, models: str | Path | Model | Sequence[str | Path | Model], out: str | Path, *,
    base: str | Path | None = None, aligned: str | Path | None = None, unaligned: str | Path | None = None,
    options: Mapping[str, Any] | None = None, dtype: str | None = None, overwrite: bool = False,
    progress: Progress = silent,
) -> Merged:  # fmt: skip
    """Write ``out``: the models, and those beside them, merged.

    Arithmetic is fp32 (float64 where a model is stored so) with one rounding to the dtype in which the layout stores a
    tensor. The layout also gives configuration, tokenizer, shards, and whatever is no floating-point tensor: it is
    ``base`` for mergekit's methods that have one, else the first of ``models``.

    Args:
        method: one of `METHODS`.
        models: folders with safetensors or Hub ids, or `Model` with weight and density.
        out: the folder to write; what an interrupted call of the same merge left there is taken up.
        base, aligned, unaligned: further models, as the method wants them.
        options: the method's, by name (``fastguard.merging.options``); mergekit's ``lambda`` is ``scale``. ``weight``
            and ``density`` among them are those of every model without its own.
        dtype: float32, bfloat16, float16 or float64, to write in another one than the layout's.
        overwrite: delete ``out`` first if it holds something else.
        progress: called with ("edit", share of bytes, shard), and before with ("compare", ...) where changes are.

    Raises:
        ValueError: an unknown method, option or dtype; models or roles that the method lacks, or does not read; models
            that do not fit each other, masks that do not fit them; weights that add up to 0 and are to be normalised;
            ``out`` is, or holds, what is read.
        TypeError: quantised weights.
        FileNotFoundError, FileExistsError, OSError, RuntimeError: as in `edits.stream`.
        FloatingPointError: a merged weight is not finite, or too large for the dtype.
    """
    from fastguard.merging.adapter import safe_lora_adapter

    way = _method(method)
    told = dict(options or {})
    shared = {key: told.pop(key) for key in way.parameters if key in told}
    chosen_options = _options(method, told)
    given = [m if isinstance(m, Model) else Model(m) for m in _listed(models)]
    given = [m.checked(method, way.parameters, shared) for m in given]
    roles = _roles(method, way, given, {"base": base, "aligned": aligned, "unaligned": unaligned})
    if dtype is not None and dtype not in STORED:
        raise ValueError(f"dtype: expected {', '.join(STORED)}, got {dtype!r}")
    if dtype is not None and isinstance(chosen_options, SafeLora | Somf) and is_adapter(given[0].model):
        raise ValueError(f"dtype: expected none of an adapter, which keeps its own, got {dtype!r}")
    if isinstance(chosen_options, SafeLora) and is_adapter(given[0].model):
        return safe_lora_adapter(
            given[0].model, out, roles["aligned"], roles["base"], chosen_options, overwrite=overwrite, progress=progress
        )
    read = {role: opened(role, path, isinstance(chosen_options, Somf)) for role, path in roles.items()}
    return _merge(method, way, chosen_options, given, read, Path(out), dtype, overwrite, progress)


def _merge(
    name: str, way: Method, options: Settings, models: list[Model], read: dict[str, Beside], out: Path,
    dtype: str | None, overwrite: bool, progress: Progress,
) -> Merged:  # fmt: skip
    (_, layout), *others = read.items()
    names, beside = fitted(layout, dict(others))
    there = layout.folder.tensors
    logits = None
    if isinstance(options, Somf) and options.masks is not None:
        logits = Logits.open(options.masks, {n: there[n].shape for n in names}, out)
    job = Job(options, models, layers_of(names), logits)
    edited = [n for n in names if way.applies(n, there[n].shape, options)]
    cosines: dict[str, float] = {}
    if isinstance(options, SafeLora):
        cosines = _cosines(layout, beside, edited, options, progress)
        edited = chosen(cosines, options)
    stored = None if dtype is None else STORED[dtype]
    dtypes = {n: stored for n in names if stored is not None and there[n].dtype != stored}
    tensors = {n: _change(way, job, n, dtypes.get(n)) for n in edited}
    tensors |= {n: _cast(DTYPES[to]) for n, to in dtypes.items() if n not in tensors}
    told = {
        **options.to_dict(),
        **({"models": [{p: getattr(m, p) for p in way.parameters} for m in models]} if way.parameters else {}),
        **({} if dtype is None else {"dtype": dtype}),
        **({} if logits is None else {"masks": logits.called}),
        "version": VERSION,
    }
    edit = Edit(name, told, tensors, config=_config(layout, dtype), beside=beside, dtypes=dtypes, tags=("merge",))
    done = stream(layout.folder, out, edit, name=layout.called, overwrite=overwrite, progress=progress)
    return Merged(done, cosines, tuple(edited) if cosines else ())


def _change(way: Method, job: Job, name: str, stored: str | None) -> Callable[..., Tensor]:
    def change(*versions: Tensor) -> Tensor:
        out = versions[0] if stored is None else torch.empty(versions[0].shape, dtype=DTYPES[stored])
        try:
            way.merge(job, name, versions, out)
        except FloatingPointError as error:
            raise FloatingPointError(f"{name}: {error}") from None
        return out

    return change


def _cast(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda tensor, *others: tensor.to(dtype)


def _config(layout: Beside, dtype: str | None) -> dict[str, Any]:
    """transformers has renamed the entry."""
    if dtype is None:
        return {}
    return {key: dtype for key in ("dtype", "torch_dtype") if key in layout.folder.config} or {"dtype": dtype}


def _cosines(
    layout: Beside, beside: Mapping[str, Beside], names: list[str], options: SafeLora, progress: Progress
) -> dict[str, float]:
    """Of each module that both alignment and fine-tuning changed: the cosine of its change with what C makes of it."""
    if layout.folder.config.get("model_type") in TRANSPOSED:
        raise ValueError(f"model: {layout.called!r} stores its matrices transposed, which safe_lora does not read")
    found = {}
    for count, name in enumerate(names):
        versions = [layout.folder.read(name), *(b.folder.read(b.names.get(name, name)) for b in beside.values())]
        model, safe, base = (v.to(wide(versions)) for v in versions)
        project, change = projection(safe - base, options, name), model - safe
        if project is not None and change.any():
            found[name] = cosine(project(change), change)
        progress("compare", (count + 1) / len(names), name)
    return found


# what was asked for ---------------------------------------------------------------------------------------------------


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def _options(method: str, options: Mapping[str, Any]) -> Settings:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return settings.build(OPTIONS[method], {ALIASES.get(key, key): value for key, value in plain.items()})


def _listed(models: Any) -> list[Any]:
    return list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]


def _roles(method: str, way: Method, models: list[Model], given: dict[str, str | Path | None]) -> dict[str, str | Path]:
    """By role, in the order in which the method reads them."""
    if len(models) < way.least or (way.most is not None and len(models) > way.most):
        expected = f"{way.least} or more" if way.most is None else str(way.most)
        raise ValueError(f"model: expected {expected} for {method}, got {len(models)}")
    for role, path in given.items():
        if role in way.roles and path is None:
            raise ValueError(f"{role}: {method} needs a model as {role}, got none")
        if role not in (*way.roles, *way.optional) and path is not None:
            raise ValueError(f"{role}: {method} reads none, got {str(path)!r}")
    called = ["model"] if len(models) == 1 else [f"model {i + 1}" for i in range(len(models))]
    own = {name: m.model for name, m in zip(called, models, strict=True)}
    beside = {role: path for role in (*way.roles, *way.optional) if (path := given[role]) is not None}
    return {**own, **beside} if way.models_first else {**beside, **own}

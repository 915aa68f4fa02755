"""mergekit's YAML, as far as it speaks of whole models:

    merge_method: ties
    base_model: base
    models:
      - {model: a, parameters: {weight: 0.5, density: 0.3}}
      - {model: b, parameters: {weight: [0, 1], density: 0.3}}
    parameters: {normalize: true, lambda: 0.8}
    dtype: bfloat16

``weight`` and ``density`` under the outer ``parameters`` are those of every model without its own; the base may stand
among the models without parameters, as mergekit's examples have it. Our own methods take ``aligned`` and ``unaligned``.
What is not read (``slices``, ``tokenizer_source``, a model with an adapter, ...) is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastguard.merging.apply import ROLES, Merged, merge
from fastguard.merging.inputs import Model
from fastguard.progress import Progress, silent

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "aligned", "unaligned")
OF_MODELS = ("weight", "density")
IGNORED = ("int8_mask",)
"""Without effect on the outcome: what mergekit saves memory by."""


def from_recipe(file: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> Merged:
    """Write ``out`` as a YAML file says; otherwise as `merge`.

    Paths of models are read from the working folder, as mergekit does.

    Raises FileNotFoundError where there is no such file, ValueError for what is no YAML and for keys that are not read,
    and what `merge` raises.
    """
    found = read(file)
    return merge(found.pop("method"), found.pop("models"), out, **found, overwrite=overwrite, progress=progress)


def read(file: str | Path) -> dict[str, Any]:
    """The arguments of `merge` that a file gives."""
    import yaml

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {str(path)!r}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from None
    return arguments(tree)


def arguments(tree: Any) -> dict[str, Any]:
    """The arguments of `merge` that a mapping as above stands for."""
    _known("config", tree, KEYS)
    method = tree.get("merge_method")
    if not isinstance(method, str):
        raise ValueError(f"merge_method: expected a name, got {method!r}")
    options = _read(_known("parameters", tree.get("parameters") or {}, None))
    if not isinstance(tree.get("models"), list):
        raise ValueError(f"models: expected a list of models, got {tree.get('models')!r}")
    base = tree.get("base_model")
    models = []
    for i, one in enumerate(tree["models"]):
        where = f"models[{i}]"
        _known(where, one, ("model", "parameters"))
        own = _read(_known(f"{where}.parameters", one.get("parameters") or {}, None))
        if _name(where, one.get("model")) == base and method != "linear":
            if own:
                raise ValueError(f"{where}.parameters: expected none of the base model, got {own!r}")
            continue
        models.append(Model(_name(where, one["model"]), **_known(f"{where}.parameters", own, OF_MODELS)))
    dtypes = {tree[key] for key in ("dtype", "out_dtype") if tree.get(key) is not None}
    if len(dtypes) > 1:
        raise ValueError(f"out_dtype: expected dtype's, since arithmetic is fp32 anyway, got {tree['out_dtype']!r}")
    given = {"base": base, **{role: tree.get(role) for role in ROLES if role != "base"}}
    roles = {role: _name(role, name) for role, name in given.items() if name is not None}
    return {"method": method, "models": models, "options": options, "dtype": next(iter(dtypes), None), **roles}


def _known(where: str, tree: Any, keys: tuple[str, ...] | None) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {tree!r}")
    for key in tree if keys is not None else ():
        if key not in keys:  # type: ignore[operator]
            raise ValueError(f"{where}.{key}: not read here; expected one of {', '.join(keys)}")  # type: ignore[arg-type]
    return tree


def _read(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in IGNORED}


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or "+" in Path(name).name:
        raise ValueError(f"{where}: expected a folder or a Hub id (adapters merged before), got {name!r}")
    return name

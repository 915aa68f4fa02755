"""The models that a merge reads: opened, named by role, and held against each other tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastguard.edits.shards import ADAPTER_CONFIG, DTYPES, Folder, Stored, is_adapter
from fastguard.edits.stream import Beside, source_folder
from fastguard.merging.parameters import Parameter, checked, in_layer
from fastguard.settings import SettingError

BUFFERS = ("inv_freq", "masked_bias")
"""Ends of names: what old files store beside their parameters, and new ones do not."""
LORA = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
)  # fmt: skip
"""Of an adapter's configuration: what its factors mean, in which adapters must agree to be merged factor by factor."""
WHOLE = ("I64", "I32", "I16", "U32", "U16", "BOOL")
"""Counters and indices: the layout's are kept."""


@dataclass(frozen=True)
class Model:
    """One model to be merged: a folder or a Hub id, and its parameters; None: what all models have, or 1."""

    model: str | Path
    weight: Parameter | None = None
    density: Parameter | None = None

    def checked(self, method: str, reads: Sequence[str], shared: Mapping[str, Parameter]) -> Model:
        """The same with all parameters that the method reads, as numbers. Raises SettingError, which names the key."""
        values = {}
        for key, least, most in (("weight", -math.inf, math.inf), ("density", 0, 1)):
            own = getattr(self, key)
            if own is not None and key not in reads:
                raise SettingError(key, own, f"none of a model, since {method} reads none")
            if key in reads:
                given = shared.get(key, 1.0) if own is None else own
                values[key] = checked(key, given, at_least=least, at_most=most)
        return Model(self.model, **values)


def opened(role: str, model: str | Path, adapters: bool = False) -> Beside:
    """A model's folder under its role; with ``adapters`` it may be a PEFT adapter's.

    Raises FileNotFoundError or ValueError where there is none that can be read, TypeError where it is quantised.
    """
    try:
        folder = Folder.open_adapter(Path(model)) if adapters and is_adapter(model) else source_folder(model)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{role}: {error}") from error
    if folder.config.get("quantization_config"):
        raise TypeError(f"{role}: {str(model)!r} is quantised (quantization_config); dequantise it first")
    return Beside(folder, str(model))


def fitted(layout: Beside, beside: Mapping[str, Beside]) -> tuple[list[str], dict[str, Beside]]:
    """The tensors to be merged, and the further folders with their names of them.

    Raises:
        ValueError: a model of another type, that lacks tensors or has further ones, or has one in another shape.
        TypeError: tensors of a dtype that is not computed with.
    """
    own = layout.folder
    names = [name for name, stored in own.tensors.items() if stored.dtype not in WHOLE and not _buffer(name, stored)]
    for name in names:
        _computable("layout", layout, own.tensors[name])
    found = {role: _matched(role, other, layout, names) for role, other in beside.items()}
    return names, found


def _matched(role: str, other: Beside, layout: Beside, names: list[str]) -> Beside:
    mine, theirs = layout.folder, other.folder
    if theirs.config_name != mine.config_name:
        raise ValueError(
            f"{role}: expected adapters alone or whole models alone, got {other.called!r} beside {layout.called!r}"
        )
    for key in LORA if mine.config_name == ADAPTER_CONFIG else ():
        if theirs.config.get(key) != mine.config.get(key):
            raise ValueError(
                f"{role}: {other.called!r} has {key} = {theirs.config.get(key)!r}, expected {mine.config.get(key)!r} "
                f"as in {layout.called!r}; factors of different adapters do not add up"
            )
    kinds = mine.config.get("model_type"), theirs.config.get("model_type")
    if kinds[0] != kinds[1]:
        raise ValueError(f"{role}: {other.called!r} is a {kinds[1]}, expected a {kinds[0]} as {layout.called!r} is")
    lacking = [name for name in names if name not in theirs.tensors]
    further = [n for n, stored in theirs.tensors.items() if n not in mine.tensors and not _buffer(n, stored)]
    # A tied head may be stored or not.
    called = {name: twin for name in lacking if _tied(theirs) and (twin := _twin(mine, name)) in theirs.tensors}
    lacking = [name for name in lacking if name not in called]
    further = [name for name in further if not (_tied(theirs) and _twin(theirs, name) in mine.tensors)]
    for what, some in (("lacks", lacking), ("has beside those", further)):
        if some:
            raise ValueError(
                f"{role}: {other.called!r} {what} of {layout.called!r} {len(some)} tensors, the first {some[0]!r}; "
                "expected models of one architecture, adapters merged"
            )
    for name in names:
        there = theirs.tensors[called.get(name, name)]
        if there.shape != mine.tensors[name].shape:
            shapes = list(there.shape), list(mine.tensors[name].shape)
            why = "; do their vocabularies differ?" if shapes[0][1:] == shapes[1][1:] else ""
            raise ValueError(
                f"{role}: {there.name!r} is {shapes[0]} in {other.called!r}, expected {shapes[1]} as in "
                f"{layout.called!r}{why}"
            )
        _computable(role, other, there)
    return Beside(theirs, other.called, called)


def _computable(role: str, one: Beside, stored: Stored) -> None:
    if stored.dtype not in DTYPES:
        raise TypeError(
            f"{role}: {stored.name!r} of {one.called!r} is stored as {stored.dtype}, expected {', '.join(DTYPES)}; "
            "dequantise the model first"
        )


def _buffer(name: str, stored: Stored) -> bool:
    """A constant beside the parameters; GPT-2's causal mask is called a bias."""
    return name.endswith(BUFFERS) or (name.endswith(".bias") and len(stored.shape) == 4)


def _tied(folder: Folder) -> bool:
    return bool(folder.config.get("tie_word_embeddings", True))


def _twin(folder: Folder, name: str) -> str | None:
    """Another tensor of the same bytes: of a tied head that is stored all the same, the embedding."""
    one = folder.tensors[name]
    inside = in_layer(name) or len(one.shape) != 2  # where nothing is tied, and no bytes need be compared
    alike = [] if inside else [t for t in folder.tensors.values() if not in_layer(t.name) and t.shape == one.shape]
    content = folder.read_bytes(name) if len(alike) > 1 else b""
    return next((t.name for t in alike if t.name != name and folder.read_bytes(t.name) == content), None)

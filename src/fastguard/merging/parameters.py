"""mergekit's parameters: a number, or numbers by layer, or either by what a tensor's name holds.

    0.5
    [0.0, 0.5, 1.0]                                         # interpolated over the layers
    [{filter: self_attn, value: [0, 1]}, {value: 0.5}]      # the first whose text is in the name

``filter`` is a part of a tensor's name; none, or ``*``, is every tensor. A list is spread over the layers from first to
last; tensors outside the layers (embedding, final norm, head) get its first number, as in mergekit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastguard.settings import SettingError

Parameter = Any
"""As above, as YAML and JSON have it."""

_LAYER = re.compile(r"\.(\d+)\.")


def checked(key: str, parameter: Parameter, *, at_least: float = -math.inf, at_most: float = math.inf) -> Parameter:
    """The same, with numbers that YAML read as text made numbers.

    Raises SettingError for what is no parameter, and for numbers that are not finite or out of range.
    """
    if isinstance(parameter, Mapping):
        parameter = [parameter]
    if isinstance(parameter, Sequence) and not isinstance(parameter, str):
        if not parameter:
            raise SettingError(key, parameter, "at least one number")
        if any(isinstance(one, Mapping) for one in parameter):
            return [_conditional(key, one, at_least, at_most) for one in parameter]
        return [_number(key, one, at_least, at_most) for one in parameter]
    return _number(key, parameter, at_least, at_most)


def _conditional(key: str, one: Any, at_least: float, at_most: float) -> dict[str, Any]:
    if not isinstance(one, Mapping) or not {"value"} <= set(one) <= {"value", "filter"}:
        raise SettingError(key, one, "{filter: TEXT, value: NUMBER or NUMBERS}")
    if isinstance(one["value"], Mapping) or any(isinstance(v, Mapping) for v in _listed(one["value"])):
        raise SettingError(key, one, "a number, or numbers by layer, as value")
    if one.get("filter") is not None and not isinstance(one["filter"], str):
        raise SettingError(key, one, "a part of a tensor's name as filter")
    value = checked(key, one["value"], at_least=at_least, at_most=at_most)
    return {**({} if one.get("filter") in (None, "*") else {"filter": one["filter"]}), "value": value}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _number(key: str, value: Any, at_least: float, at_most: float) -> float:
    bounds = "" if (at_least, at_most) == (-math.inf, math.inf) else f" from {at_least:g} to {at_most:g}"
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not at_least <= number <= at_most:
        raise SettingError(key, value, f"a number{bounds}, numbers by layer, or either by filter")
    return number


def value_at(key: str, parameter: Parameter, tensor: str, layers: int) -> float:
    """The number that a `checked` parameter has for a tensor of a model of so many layers.

    Raises SettingError where no filter meets the tensor.
    """
    if isinstance(parameter, float):
        return parameter
    if not isinstance(parameter[0], Mapping):
        return _spread(parameter, tensor, layers)
    for one in parameter:
        if one.get("filter") is None or one["filter"] in tensor:
            return value_at(key, one["value"], tensor, layers)
    raise SettingError(key, parameter, f"a last entry without filter, since none meets {tensor}")


def in_layer(tensor: str) -> bool:
    """Whether a tensor belongs to one of the model's layers, by the number in its name."""
    return _LAYER.search(tensor) is not None


def _spread(numbers: Sequence[float], tensor: str, layers: int) -> float:
    found = _LAYER.search(tensor)
    share = 0.0 if found is None else int(found[1]) / (layers - 1) if layers > 1 else 1.0
    scaled = min(share, 1.0) * (len(numbers) - 1)
    low = min(int(scaled), len(numbers) - 1)
    high = min(low + 1, len(numbers) - 1)
    return (1 - (scaled - low)) * numbers[low] + (scaled - low) * numbers[high]


def layers_of(tensors: Iterable[str]) -> int:
    """How many layers these names tell of."""
    return max((int(found[1]) + 1 for name in tensors if (found := _LAYER.search(name))), default=0)

"""Settings that check themselves: frozen dataclasses whose fields say what they accept, built from plain values.

``number`` and ``choice`` make fields; a value out of range is a ``SettingError`` that names the key, what was given
and what was expected. `build` makes one out of a mapping, as YAML or JSON give it, and refuses unknown keys.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


class SettingError(ValueError):
    """A key with a value that it cannot have."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}: expected {expected}, got {value!r}")
        self.key, self.value, self.expected = key, value, expected

    def under(self, where: str) -> SettingError:
        """The same error of a section's key."""
        return SettingError(f"{where}.{self.key}" if where else self.key, self.value, self.expected)


def number(
    default: Any, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None,
    below: float | None = None,
) -> Any:  # fmt: skip
    """A field of a number, or of a tuple of such numbers, in a range; not finite is out of every range."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={"limits": {k: v for k, v in limits.items() if v is not None}})


def choice(default: Any, *choices: str) -> Any:
    """A field that is one of these words."""
    return field(default=default, metadata={"choices": choices})


def numbers(default: tuple[float, ...], *, above: float | None = None, at_least: float | None = None) -> Any:
    """A field of a tuple of numbers, at least one."""
    limits = {"above": above, "at_least": at_least}
    return field(default=default, metadata={"limits": {k: v for k, v in limits.items() if v is not None}, "some": True})


T = typing.TypeVar("T")

_TESTS = {
    "at_least": (lambda v, x: v >= x, ">= {:g}"),
    "above": (lambda v, x: v > x, "> {:g}"),
    "at_most": (lambda v, x: v <= x, "<= {:g}"),
    "below": (lambda v, x: v < x, "< {:g}"),
}


@dataclass(frozen=True)
class Settings:
    """A section of settings.

    ``quick``: what makes its work small enough for a test machine. ``timed``: of a method, with what its step is timed
    where the defaults would take minutes or leave out a part. ``models``: fields that name a model beside the one that
    is worked on; a run puts the folders of its own models there.
    """

    quick: ClassVar[Mapping[str, Any]] = {}
    timed: ClassVar[Mapping[str, Any]] = {}
    models: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices, limits = f.metadata.get("choices"), f.metadata.get("limits", {})
            if choices and value not in choices:
                raise SettingError(f.name, value, " or ".join(map(str, choices)))
            if f.metadata.get("some") and not value:
                raise SettingError(f.name, value, "at least one")
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, int | float) and not isinstance(one, bool):
                    self._in_range(f.name, one, limits, "int" in str(f.type))
        self.check()

    @staticmethod
    def _in_range(name: str, value: float, limits: Mapping[str, float], whole: bool) -> None:
        kind = "an integer" if whole else "a number"
        if not math.isfinite(value):
            raise SettingError(name, value, f"{kind} that is finite")
        for limit, bound in limits.items():
            holds, said = _TESTS[limit]
            if not holds(value, bound):
                raise SettingError(name, value, f"{kind} {said.format(bound)}")

    def check(self) -> None:
        """What depends on more than one field; raises `SettingError`."""

    def describe(self) -> str:
        """What differs from the defaults, in one line for a reader; empty where nothing does."""
        changed = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if _changed(self, f)]
        return ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in changed)

    def uncompilable(self, processes: int) -> str:
        """Why so many processes cannot compile a model's layers under a method of these options; empty if they can."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return dataclasses.asdict(self)


def _changed(settings: Settings, f: dataclasses.Field[Any]) -> bool:
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc,operator]
    return bool(getattr(settings, f.name) != default)


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, section by section."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def build(kind: type[T], tree: object, where: str = "") -> T:
    """A settings dataclass from a mapping, recursively. Raises ValueError that names the key."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where or 'config'}: expected a mapping, got {tree!r}")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ValueError(f"{name}: unknown key; expected one of {', '.join(known) or 'none'}")
        values[str(key)] = _convert(hints[key], value, name)
    try:
        return kind(**values)
    except SettingError as error:
        raise error.under(where) from None
    except ValueError as error:  # of what a section holds, named by its own key
        raise ValueError(f"{where}.{error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, name)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(arguments[0], item, name) for item in items)
    if origin is not None:  # a mapping, whose content is checked by whoever knows what it means
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected a mapping, got {value!r}")
        return {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in value.items()}
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-5 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name}: expected a number, got {value!r}") from None
    if hint is float and type(value) is int:
        value = float(value)
    if hint is not Any and type(value) is not hint:
        raise ValueError(f"{name}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value

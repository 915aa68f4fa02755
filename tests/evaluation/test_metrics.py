import json
import typing
from pathlib import Path

import pytest

from fastguard.evaluation.metrics import SCHEMA, Metrics, area, crossing

EXAMPLE = Path(__file__).parent / "example_metrics.json"


def assert_matches(hint, value, where="metrics"):
    """``value``, as JSON gives it, is what the typed dictionaries say: none missing, none unknown, types right."""
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        assert isinstance(value, dict), where
        assert hint.__required_keys__ <= set(value) <= set(hints), f"{where}: {sorted(value)} != {sorted(hints)}"
        for key in value:
            assert_matches(hints[key], value[key], f"{where}.{key}")
        return
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            assert_matches(arguments[0], item, f"{where}[{i}]")
    elif origin is dict:
        assert isinstance(value, dict), where
        for key, item in value.items():
            assert_matches(arguments[1], item, f"{where}.{key}")
    elif arguments:  # X | None
        assert value is None or assert_matches(arguments[0], value, where) is None, where
    elif hint is float:
        assert isinstance(value, int | float) and not isinstance(value, bool), f"{where}: {value!r}"
    elif hint is not object:
        assert type(value) is hint, f"{where}: {value!r} is not {hint}"


def test_the_example_document_follows_the_schema():
    example = json.loads(EXAMPLE.read_text())
    assert_matches(Metrics, example)
    assert example["schema"] == SCHEMA
    broken = json.loads(EXAMPLE.read_text())
    del broken["models"]["control"]["attacks"][0]["seed"]
    with pytest.raises(AssertionError, match=r"control\.attacks\[0\]"):
        assert_matches(Metrics, broken)


@pytest.mark.parametrize(
    ("values", "rising", "expected"),
    [
        ([0.0, 0.25, 0.75, 1.0], True, 3.0),  # halfway between the steps 2 and 4
        ([0.0, 0.5, 0.1, 1.0], True, 2.0),  # touched is reached, and the first time counts
        ([0.6, 0.0, 0.0, 0.0], True, 0.0),
        ([0.0, 0.1, 0.2, 0.49], True, None),
        ([1.0, 0.8, 0.2, 0.0], False, 3.0),
        ([1.0, 1.0, 1.0, 0.51], False, None),
    ],
)
def test_crossing(values, rising, expected):
    assert crossing([0, 2, 4, 8], values, 0.5, rising) == (None if expected is None else pytest.approx(expected))


def test_area_is_the_mean_height_and_carries_the_last_value_on():
    assert area([0, 2, 4], [0.0, 1.0, 1.0], 4) == pytest.approx(0.75)
    assert area([0, 2, 4], [0.0, 1.0, 1.0], 8) == pytest.approx((1 + 2 + 4) / 8)
    assert area([0], [0.3], 0) == 0.3


def test_curves_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="increase"):
        crossing([0, 2, 2], [0.0, 0.0, 1.0], 0.5)
    with pytest.raises(ValueError, match="equally many"):
        area([0, 1], [0.0], 4)
    with pytest.raises(ValueError, match="budget"):
        area([0, 8], [0.0, 1.0], 4)

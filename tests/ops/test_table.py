"""The table of block shapes: which row is taken, and what is said of one that is none."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch

from fastguard.ops import table
from fastguard.ops.table import Chip


class Shape(NamedTuple):
    side: int
    warps: int
    stages: int


def row(side):
    return {"side": side, "warps": 4, "stages": 2}


ROWS = {"by name": row(512), "sm_90": row(256), "100 KiB": row(128), "64 KiB": row(64)}
OTHER = Chip("another", "sm_86", 99 * 1024)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a table, which is then the one in use."""

    def write(content):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"  # a file is read once
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(table.VARIABLE, str(file))
        return file

    return write


def found(chip, *shapes, **options):
    return table.find("kernel", shapes or ("half",), chip, Shape, **options).side


def test_the_row_is_the_names_then_the_capabilitys_then_of_the_most_shared_memory_that_fits(written):
    written({"kernel": {"half": ROWS}})
    assert found(Chip("by name", "sm_90", 0)) == 512
    assert found(Chip("another", "sm_90", 0)) == 256
    assert found(OTHER._replace(shared=100 * 1024)) == 128 and found(OTHER) == 64
    assert table.row_of("kernel", ("half",), Chip("", "", 0)) is None
    assert table.row_of("kernel", ("half",), OTHER) == row(64)
    with pytest.raises(ValueError, match=r"kernel: half: expected a row for a CPU, found none"):
        found(Chip("", "", 0))


def test_a_row_of_a_width_is_taken_for_that_width_alone(written):
    narrow, wide = (table.classes(torch.bfloat16, width) for width in (4095, 4096))
    assert wide == ("half, 4096 wide", "half") == table.classes(torch.float16, 8191)
    assert table.classes(torch.float32, 1, "bias") == ("float32, bias, 1 wide", "float32, bias")
    written({"kernel": {"half, 4096 wide": {"another": row(16)}, "half": ROWS}})
    assert found(OTHER, *wide) == 16 and found(OTHER, *narrow) == 64


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "expected a table of configurations"),
        ({"kernel": []}, r"kernel: expected names and values, got \[\]"),
        ({"kernel": {"half": {"sm_86": 3}}}, "kernel: half: sm_86: expected names and values, got 3"),
        ({"kernel": {"half": {"sm_86": row(100)}}}, "kernel: half: sm_86: side: expected 16, 32, .*, got 100"),
        ({"other": {"half": {"x": {"warps": 3}}}}, "other: half: x: warps: expected 1, 2, 4, 8, 16, got 3"),
        ({"kernel": {"half": {"1e2KiB": row(16)}}}, "kernel: half: expected a chip, or a size .*, got '1e2KiB'"),
        ({"kernel": {"half": {"sm_86": {"side": 64}}}}, "kernel: half: sm_86: expected side, warps, stages, got side"),
        ({"kernel": {"half": {"sm_86": row(256)}}}, "kernel: half: sm_86: side: expected at most 128, got 256"),
    ],
)
def test_a_row_that_is_none_is_named_with_its_file(content, said, written):
    file = written(content)
    with pytest.raises(ValueError, match=f"{file}: {said}"):
        found(OTHER, most={"side": 128})


def test_a_candidate_is_taken_by_calls_of_its_class_alone_and_knows_whether_one_was_made(written):
    written({"kernel": {"half": ROWS, "float32": ROWS}})
    with table.forced("kernel", "half", row(32)) as candidate:
        assert found(OTHER, "float32") == 64 and not candidate.used
        assert found(OTHER, "half, 4096 wide", "half") == 32 and candidate.used
    assert found(OTHER) == 64


def test_the_installed_table_is_whole_and_written_as_the_tuner_writes_it():
    tuned = json.loads(table.INSTALLED.read_text())[table.TUNED]
    assert table.text(table.read(table.INSTALLED), tuned) == table.INSTALLED.read_bytes()

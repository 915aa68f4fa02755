import dataclasses
import subprocess
import sys

import pytest

from fastguard.data.options import BenignParts, Columns, PairParts, RetainParts, SetConfig, UserData

ONE = {"pairs": SetConfig("p.jsonl"), "retain": SetConfig("r.jsonl")}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"retain": SetConfig()}, r"retain\.path: expected a file, a folder, a Hub id or `packaged`, got ''"),
        ({"edgy": SetConfig()}, r"edgy\.path: expected"),
        ({"edgy": SetConfig("e", placeholders=True)}, r"edgy\.placeholders: expected false in this role"),
        ({"measure_harmful": SetConfig("e", refusals=True)}, r"measure_harmful\.refusals: expected false"),
        ({"pairs": SetConfig("packaged", refusals=True)}, r"pairs\.placeholders: expected true"),
        ({"pairs": SetConfig("packaged", placeholders=True)}, r"pairs\.refusals: expected true"),
        ({"retain": SetConfig("packaged", columns=Columns(part="x"))}, r"retain\.columns: expected none"),
        ({"retain": SetConfig("r", limit=0)}, r"retain\.limit: expected at least 1, or null, got 0"),
        ({"edgy": SetConfig("e", columns=Columns(part="x"))}, r"edgy\.columns\.part: expected null; only pairs, "),
        ({"pair_parts": PairParts(align=1.5)}, r"pair_parts\.align: expected a share from 0 to 1, or a count"),
        ({"pair_parts": PairParts(align=-0.5)}, r"pair_parts\.align"),
        ({"pair_parts": PairParts(align=float("nan"))}, r"pair_parts\.align"),
        ({"pair_parts": PairParts(immunize=0)}, r"pair_parts\.immunize: expected more than 0"),
        ({"retain_parts": RetainParts(immunize=0)}, r"retain_parts\.immunize"),
        ({"benign_parts": BenignParts(train=0)}, r"benign_parts\.train"),
        ({"prompt_tokens": 0}, "prompt_tokens: expected an integer >= 1"),
        ({"on_bad_row": "skip"}, "on_bad_row: expected error or drop, got 'skip'"),
    ],
)
def test_mistakes_are_named(given, error):
    with pytest.raises(ValueError, match=error):
        UserData(**{**ONE, **given})


def test_paths_beside_the_configuration(tmp_path):
    (tmp_path / "p.jsonl").touch()
    own = UserData(**ONE, edgy=SetConfig("packaged")).located(tmp_path)
    assert own.pairs.path == str(tmp_path / "p.jsonl") and own.retain.path == "r.jsonl" and own.edgy.path == "packaged"
    assert dataclasses.replace(own, pairs=ONE["pairs"]) == UserData(**ONE, edgy=SetConfig("packaged"))


def test_options_need_no_torch():
    code = "import sys; from fastguard.data import options, rows, sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

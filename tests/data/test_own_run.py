"""From a configuration file that names its own sets to a whole run on them."""

import json
import re
from pathlib import Path

import pytest
import yaml

import tiny
from data.test_own import answers, pairs
from evaluation.test_metrics import assert_matches
from fastguard.data.options import PairParts, SetConfig
from fastguard.evaluation.metrics import Metrics
from fastguard.run import config as configuration
from fastguard.run import pipeline

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_documented_configuration_is_one():
    example = re.search(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL).group(1)
    config = configuration.from_dict(yaml.safe_load(example))
    own = config.data.own
    assert own.pairs.columns.harmful == "bad_response" and own.retain.limit == 20000
    assert own.measure_harmful.placeholders and own.edgy == SetConfig("packaged") and own.measure_harmless is None
    assert own.pair_parts == PairParts(align=0.0, immunize=0.6, attack=0.4, measure=0.15)
    assert configuration.from_dict(config.to_dict()) == config
    smallest = re.search(r"`(data: \{own: .*?\}\}\})`", DOCUMENT.read_text()).group(1)
    assert configuration.from_dict(yaml.safe_load(smallest)).data.own.retain.path == "retain.jsonl"


def test_mistakes_in_a_file_are_named():
    own = {"pairs": {"path": "p.jsonl"}, "retain": {"path": "r.jsonl"}}
    with pytest.raises(ValueError, match=r"data\.own\.pairs\.colums: unknown key"):
        configuration.from_dict({"data": {"own": {**own, "pairs": {"path": "p", "colums": {}}}}})
    with pytest.raises(ValueError, match=r"pair_parts\.attack: expected a share from 0 to 1"):
        configuration.from_dict({"data": {"own": {**own, "pair_parts": {"attack": 1.5}}}})


def test_a_run_on_own_sets(tmp_path):
    system = [{"role": "system", "content": "be brief"}]
    rows = [{**r, "prompt": [*system, {"role": "user", "content": r["prompt"]}]} for r in pairs()]
    for name, content in (("pairs", rows), ("retain", answers()), ("benign", answers(10, "benign"))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    own = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("pairs", "retain", "benign")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({
        "model": {"name": str(tiny.folder(tmp_path / "base")), "chat_template": "model"},
        "data": {"own": own},
        "align": {"steps": 1, "refusals": 2, "harmless": 1},
        "immunize": {"steps": 1, "pairs": 2, "retain": 2, "options": {"layers": 1}},
        "attack": {"batch": 2, "scored_steps": [0, 1], "lr": [1e-3]},
        "evaluate": {"score_tokens": 2, "sample_tokens": 2, "samples": 1, "benign_batch": 2, "benign_steps": [0, 1]},
    }))  # fmt: skip
    metrics = pipeline.run(configuration.load(file), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert_matches(Metrics, written)
    assert written["data"]["harmful"]["rows"] == 40 and written["data"]["harmful"]["source"].endswith("pairs.jsonl")
    assert set(written["data"]) == {"harmful", "harmless", "benign"}
    utility = metrics["models"]["immunized"]["utility"]
    assert utility["edgy_over_refusal"] is None and utility["benign"] is not None
    assert isinstance(utility["samples"][0]["prompt"], str)

"""The report: complete, self-contained, faithful to the metrics, and readable in light and dark."""

import copy
import html.parser
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from evaluation.test_metrics import assert_matches
from fastguard.evaluation import report
from fastguard.evaluation.figures import Line, Panel, svg
from fastguard.evaluation.metrics import Metrics

EXAMPLE = Path(__file__).parent / "example_metrics.json"


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """matplotlib takes seconds a page: what a test before has had drawn is not drawn again."""
    known = {}

    def once(panel):
        if repr(panel) not in known:
            known[repr(panel)] = svg(panel)
        return known[repr(panel)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "svg", once)
        yield


@pytest.fixture
def metrics():
    return json.loads(EXAMPLE.read_text())


@pytest.fixture(scope="module")
def page():
    return report.render(json.loads(EXAMPLE.read_text()))


class Page(html.parser.HTMLParser):
    """Collects what a page would load, its ids and its text; fails on a tag that is not closed."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input", "path", "use", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.text, self.policy = [], [], set(), "", None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "href", "xlink:href", "action", "data", "poster")]
        self.loads += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for _, v in attrs))
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def test_page_loads_nothing_from_outside(page):
    parsed = Page(page)
    assert parsed.loads, "the drawings refer to their own markers"
    for target in parsed.loads:
        assert target == "data:," or (target.startswith("#") and target[1:] in parsed.ids), target
    assert "default-src 'none'" in parsed.policy
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_colours_are_the_pages_own_in_light_and_dark(page):
    assert not re.search(r"#0000[0-9a-f]{2}\b", page), "a mark of a drawing was not replaced"
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
    light, dark = (set(re.findall(r"(--[a-z0-9-]+):", block)) for block in re.findall(r":root \{(.*?)\}", page, re.S))
    assert used <= light and light == dark


def test_page_says_what_the_metrics_say(page, metrics):
    text = " ".join(Page(page).text.split())
    assert "3.4 on the aligned model, 18.0 on the immunized model and 3.8 on the control model" in text
    assert "Perplexity on harmless text: 10.9 after immunization, 8.70 before (1.25 times)" in text
    for model in metrics["models"].values():
        assert model["label"] in text and model["training"]["method"] in text
    for source in metrics["data"].values():
        assert source["source"] in text and source["licence"] in text
    for stage in metrics["stages"]:
        assert stage["name"] in text
    for name, version in metrics["environment"]["versions"].items():
        assert f"{name} {version}" in text
    for aim in metrics["aims"]:
        assert aim["name"] in text
    assert text.count(" missed ") == 1 and text.count(" met ") == 2 and "not measured" in text
    assert "alpha: 60.0" in text and "2 min 35 s" in text and "2.79 GiB" in text and metrics["notes"][0] in text
    assert "36 held-out harmful prompts: one prompt is 2.8 points" in text and "±16 points" in text
    # compliance, refusal and harmful loss under attack; three trainings; the benign task
    assert page.count("<svg ") == 7 and page.count("Quick run") == 0


def test_the_comparison_has_a_cell_for_every_model(metrics):
    groups = report.comparison(metrics)
    rows = {row.name: row.cells for group in groups for row in group.rows}
    assert all(len(cells) == 3 for cells in rows.values())
    assert rows["Steps until 50% comply"] == ["3.4", "18.0", "3.8"]
    assert rows["Steps until refusal falls to 50%"] == ["3.0", "6.7", "3.6"]
    assert rows["Mean compliance"] == ["83%", "38.4%", "52.3%"]
    assert rows["Harmful loss"] == ["1.60 → 0.600", "26.0 → 2.20", "1.80 → 0.700"]
    assert rows["Perplexity"] == ["8.70", "10.9", "8.40"]


def test_what_was_not_reached_or_not_measured_is_said(metrics):
    immunized = metrics["models"]["immunized"]
    immunized["attacks"][0]["compliance_crossing"] = None
    immunized["utility"] |= {"benign": None, "edgy_over_refusal": None}
    rows = {row.name: row.cells[1] for group in report.comparison(metrics) for row in group.rows}
    assert rows["Steps until 50% comply"] == "more than 32"
    assert rows["Learns a benign task"] == rows["Refusal of edgy prompts"] == "not measured"
    assert "more than 32 on the immunized model" in report.headlines(metrics)[0]
    assert report.render(metrics)


def test_several_seeds_rates_and_models(metrics):
    for model in metrics["models"].values():
        again = copy.deepcopy(model["attacks"][0]) | {"seed": 1}
        again["compliance_crossing"] += 2
        model["attacks"] += [again, copy.deepcopy(again) | {"lr": 2e-5, "seed": 0}]
    metrics["models"]["no noise"] = copy.deepcopy(metrics["models"]["immunized"]) | {"label": "no noise"}
    assert report.headlines(metrics)[1].count("19.0 (18.0 to 20.0)") == 2
    page = report.render(metrics)
    assert page.count("<svg ") == 2 * 3 + 4 + 1 and "One curve per seed" in page
    assert "2 seeds per learning rate" in page and "2e-05 and 5e-05" in page
    Page(page)


def test_training_curves_show_the_parts_of_the_loss_in_colours_of_their_own(metrics):
    point = {"step": 0, "loss": 7.125, "gradient_norm": 99.0}
    metrics["models"]["aligned"]["training"]["curve"] = [point, point | {"step": 3}]
    parts = {f"part_{i}": 1.0 + i for i in range(7)}
    metrics["models"]["control"]["training"]["curve"] = [point | parts, point | parts | {"step": 3}]
    aligned, _, control = report._training_figures(metrics)
    assert "Making aligned: loss<" in aligned["svg"] and [name for name, _ in aligned["legend"]] == ["loss"]
    ticks = re.findall(r">([\d.]+)</text>", aligned["svg"])
    assert ticks and max(map(float, ticks)) < 10, "the gradient norm is drawn as a loss"
    assert [name for name, _ in control["legend"]] == [f"part {i}" for i in range(7)]
    assert len({series for _, series in control["legend"]}) == 7
    page = report.render(metrics)
    assert set(re.findall(r"var\((--series-\d+)\)", page)) <= set(re.findall(r"(--series-\d+):", page))


def served(metrics):
    """The example with a repair after each attack, two seeds of it, and a model that is fine-tuned under a guard."""
    condition = {"refusal": 0.0, "compliance": 0.5, "neither": 0.5, "harmful_loss": 0.5, "perplexity": 9.0}
    before = {**condition, "task_loss": 1.5}
    applied = {"name": "antidote", "title": "Antidote", "figures": {"pruned_share": 0.05}, "wall_s": 3.0}
    guard = {"name": "holding", "title": "Holding", "figures": {"frozen_share": 0.01}, "wall_s": 5.0}
    for i, model in enumerate(metrics["models"].values()):
        first = model["attacks"][0]
        after = {**before, "compliance": 0.25 - 0.125 * (i == 1), "perplexity": 12.0 + i}
        first["repair"] = {**applied, "before": before, "after": after}
        again = copy.deepcopy(first) | {"seed": 1}
        again["repair"]["after"]["compliance"] += 0.25
        again["repair"]["wall_s"] = 5.0
        model["attacks"].append(again)
        model["utility"]["benign"] = {**copy.deepcopy(BENIGN), "repair": {**applied, "before": before, "after": before}}
    metrics["models"]["control"]["utility"]["benign"]["repair"]["after"] = {**before, "compliance": None}
    guarded = copy.deepcopy(metrics["models"]["immunized"])
    for attack in guarded["attacks"]:
        attack["guard"] = guard
    guarded["training"] = {"parent": "immunized", "method": "as immunized", "steps": 0, "wall_s": 0, "lr": None,
                           "curve": []}  # fmt: skip
    metrics["models"]["immunized, guarded"] = guarded | {"label": "immunized, under Holding"}
    return metrics


BENIGN = {"lr": 5e-5, "batch": 4, "steps": [0, 12], "loss": [2.0, 1.5]}


def test_what_a_repair_changed_is_a_table_of_its_own(metrics):
    assert report.repairs(metrics) == [] and "Repair after" not in report.render(metrics)
    metrics = served(metrics)
    assert_matches(Metrics, metrics)
    attack, benign = report.repairs(metrics)
    assert attack.title == "After harmful fine-tuning, learning rate 5e-05" and benign.title.endswith("harmless task")
    assert [row.name for row in attack.rows] == list(metrics["models"])
    aligned, immunized, *_ = attack.rows
    assert aligned.note == immunized.note == "Antidote: pruned share 0.0500"
    assert aligned.cells == ["50% → 37.5%", "0% → 0%", "0.500 → 0.500", "9.00 → 12.0", "1.50 → 1.50", "4.0 s"]
    assert immunized.cells[0] == "50% → 25%" and immunized.cells[3] == "9.00 → 13.0"
    assert [row.cells[0] for row in benign.rows][2] == "not measured"
    said = " ".join(report.headlines(metrics))
    assert "Antidote after the attack takes compliance from 50% to 37.5% on the aligned model, from 50% to 25%" in said
    rows = {row.name: row.cells for group in report.comparison(metrics) for row in group.rows}
    assert rows["Guard"] == ["none", "none", "none", "Holding, 5.0 s: frozen share 0.0100"]
    assert rows["Optimisation"][-1] == "none"
    text = " ".join(Page(report.render(metrics)).text.split())
    for row in (*attack.rows, *benign.rows):
        assert " ".join([row.name, row.note, *row.cells]) in text
    assert "No attacker knew of the guard or the repair" in text
    table = report.markdown(metrics)
    assert "| aligned (Antidote: pruned share 0.0500) | 50% → 37.5% | 0% → 0% |" in table


def test_an_edit_has_rounds_and_no_loss(metrics):
    made = metrics["models"]["immunized"]["training"]
    made |= {"lr": None, "steps": 1, "wall_s": 4.0, "curve": [{"step": 0, "pruned_share": 0.1}]}
    rows = {row.name: row.cells for group in report.comparison(metrics) for row in group.rows}
    assert rows["Optimisation"][1] == "1 round, 4.0 s"
    assert len(report._training_figures(metrics)) == 2


def test_a_run_may_lack_models(metrics):
    del metrics["models"]["control"], metrics["models"]["immunized"]
    metrics["aims"] = []
    assert report.headlines(metrics) == [
        "Attack steps until 50% of answers comply, at learning rate 5e-05: 3.4 on the aligned model."
    ]
    Page(report.render(metrics))


def test_quick_runs_are_marked(metrics):
    metrics["quick"] = True
    assert "Quick run" in report.render(metrics) and "no result" in report.limits(metrics)[0]


def test_text_from_a_model_cannot_become_markup(metrics):
    metrics["models"]["aligned"]["utility"]["samples"][0]["answer"] = "<script>alert(1)</script>"
    metrics["models"]["aligned"]["label"] = '"><img src=x>'
    page = report.render(metrics)
    assert "<script" not in page and "<img" not in page
    Page(page)


def test_the_same_metrics_give_the_same_page(page, metrics, monkeypatch):
    monkeypatch.setattr(report, "svg", svg)  # drawn again
    assert report.render(metrics) == page


def test_write_and_load(tmp_path, metrics):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        report.write(tmp_path)
    file = tmp_path / "metrics.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        report.write(tmp_path)
    file.write_text(json.dumps(metrics | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99, expected 1"):
        report.write(tmp_path)
    file.write_text(json.dumps(metrics))
    assert report.write(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_markdown_table_is_whole(metrics):
    metrics["models"]["aligned"]["training"]["method"] = "a | b"
    head, _, *table = report.markdown(metrics).splitlines()
    assert "Example CPU" in head and "2026-11-23" in head and "2 min 35 s" in head
    assert table[0] == "| | aligned | immunized | control |"
    assert {line.replace("\\|", "").count("|") for line in table} == {5}
    assert "| Steps until 50% comply (interpolated) | 3.4 | 18.0 | 3.8 |" in table


def test_summary_names_every_aim(metrics):
    lines = report.summary(metrics).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["MISSED", "met", "met", "not"]


def test_curves_are_drawn_where_the_numbers_are():
    """Two runs that differ in one point differ in the drawing; a level, a crossing and a stop each leave a trace."""
    line = Line([0, 4], [0.0, 0.8], series=1)
    base = svg(Panel("t", [line], "steps", 8, rate=True))
    moved = svg(Panel("t", [Line([0, 4], [0.0, 0.4], series=1)], "steps", 8, rate=True))
    assert base != moved and base.count("var(--series-1)") == moved.count("var(--series-1)") > 0
    stopped = svg(Panel("t", [Line([0, 4], [0.0, 0.8], 1, stopped=True)], "steps", 8, rate=True))
    assert stopped.count("var(--series-1)") == base.count("var(--series-1)") + 1
    level = svg(Panel("t", [line], "steps", 8, rate=True, level=0.5, level_label="half"))
    assert "half" in level and "half" not in base
    crossed = svg(Panel("t", [Line([0, 4], [0.0, 0.8], 1, crossing=2.5)], "steps", 8, rate=True, level=0.5))
    assert crossed.count("var(--ink)") > level.count("var(--ink)")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (41.2, "41 s"), (290, "4 min 50 s"), (59.6, "1 min 0 s"), (3900, "1 h 5 min")]
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text

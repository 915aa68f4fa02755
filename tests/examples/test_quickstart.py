"""The notebook's cells run in order, and do what its text says."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def cells(kind):
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def after():
    """The names that the cells leave behind."""
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    for number, source in enumerate(cells("code")):
        exec(compile(source, f"quickstart.ipynb, code cell {number}", "exec"), names)
    return names


def test_harmful_answers_get_less_likely_and_the_others_more(after):
    first_and_last = {name: (values[0], values[-1]) for name, values in after["curves"].items()}
    for name in ("harmful, output", "harmful, mean of the lens"):
        assert first_and_last[name][1] > first_and_last[name][0] + 1, first_and_last
    for name in ("harmless", "retain"):
        assert first_and_last[name][1] < first_and_last[name][0] - 1, first_and_last


def test_the_hooks_are_gone_and_the_attack_left_a_gradient(after):
    model = after["model"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    assert after["attacker_loss"].item() < float(after["curves"]["harmful, output"][-1])


def test_it_is_committed_without_outputs_and_its_links_arrive():
    notebook = json.loads(NOTEBOOK.read_text())
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    links = [link.split(")")[0] for text in cells("markdown") for link in text.split("](")[1:]]
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)

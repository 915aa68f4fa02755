"""`import fastguard` is cheap, touches nothing it need not, and works where only torch is installed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastguard

BUDGET_S = 0.6  # every public name, five rooms among them; 0.3 to 0.4 measured

PUBLIC = "import fastguard; [getattr(fastguard, n) for n in getattr(fastguard, '__all__', ())]"


def python(code, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_time_beyond_torch(tmp_path):
    # Processor time: the machine may be busy with other things. Up to three times: the first one leaves bytecode, as an
    # installation has it, and files may be cold.
    code = f"import time, torch; t = time.process_time()\n{PUBLIC}\nprint(time.process_time() - t)"
    cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    assert any(float(python(code, **cache)) < BUDGET_S for _ in range(3))


def test_import_loads_nothing_heavy():
    code = f"import sys, torch; before = set(sys.modules)\n{PUBLIC}\nprint('\\n'.join(set(sys.modules) - before))"
    loaded = python(code).splitlines()
    for heavy in ("triton", "transformers", "peft", "accelerate", "torch._dynamo", "torch.distributed.tensor",
                  "typer", "rich", "matplotlib", "jinja2"):  # fmt: skip
        assert not [m for m in loaded if m == heavy or m.startswith(heavy + ".")], heavy


def test_import_starts_no_gpu():
    assert python(f"import torch\n{PUBLIC}\nprint(torch.cuda.is_initialized())") == "False"


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""

USE = """
import torch
from fastguard.ops.linear_cross_entropy import linear_cross_entropy
hidden = torch.randn(5, 8)
weight = torch.randn(11, 8, requires_grad=True)
target = torch.tensor([0, 3, 10, -100, 7])
loss = linear_cross_entropy(hidden, weight, target)
loss.backward()
wanted = torch.nn.functional.cross_entropy(hidden @ weight.detach().T, target)
print(float(loss.detach() - wanted), float(weight.grad.abs().sum()) > 0)
"""


def test_works_with_torch_alone():
    optional = {"triton", "transformers", "peft", "accelerate", "safetensors", "typer", "rich", "jinja2", "matplotlib",
                "yaml"}  # fmt: skip
    error, gradient = python(BLOCKER.format(blocked=optional) + PUBLIC + USE).split()
    assert abs(float(error)) < 1e-5 and gradient == "True"


def test_missing_triton_is_named_where_it_is_asked_for():
    code = "import importlib.util as u; real = u.find_spec\n"
    code += "u.find_spec = lambda name, *rest: None if name == 'triton' else real(name, *rest)\n"
    code += "from fastguard import backend; print(backend.unavailable('triton', 'cuda'))"
    assert "pip install 'fastguard-kernels[gpu]'" in python(code)


def test_type_checkers_see_every_public_name_where_it_is():
    tree = ast.parse(Path(fastguard.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    there = {name: (home, name) for name, home in fastguard._HOMES.items()}
    there |= {room: ("fastguard", room) for room in fastguard._ROOMS}
    lines = "\n".join(f"    from {home} import {name} as {name}" for home, name in sorted(there.values()))
    assert seen == there, f"fastguard/__init__.py, under TYPE_CHECKING:\n{lines}"


SNIPPET = """
import fastguard
from torch import Tensor, nn

def right(model: nn.Module, rows: Tensor) -> Tensor:
    loss: fastguard.RepNoiseLoss = fastguard.RepNoiseLoss(model, alpha=1.0, beta=0.001, mask_padding=True)
    loss.close()
    attack = fastguard.SimulatedAttack(model, optimizer=fastguard.nested.AdamW(lr=2e-5))
    del attack
    return fastguard.lm_head_stats(rows, rows, rows).cross_entropy()

def wrong(model: nn.Module, rows: Tensor) -> None:
    fastguard.RepNoiseLoss(model, alpha="much")  # arg-type
    fastguard.RepNoiseLoss(model, gamma=1.0)  # call-arg
    fastguard.RepNoiseLos(model)  # attr-defined
    fastguard.nested.AdamW(lr="fast")  # arg-type
    fastguard.lm_head_stats(rows, rows, rows).entropie()  # attr-defined
"""


def test_the_top_level_is_typed(tmp_path, monkeypatch):
    """As `mypy --strict` of a user's file finds it; torch is left out, which alone takes it a minute."""
    api = pytest.importorskip("mypy.api")
    (tmp_path / "user.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MYPYPATH", str(Path(fastguard.__file__).parents[1]))
    printed, errors, _ = api.run(["--strict", "--no-error-summary", "--hide-error-context", "user.py"])
    found = [line for line in printed.splitlines() if ": error: " in line]
    expected = [
        (number, line.split("# ")[1]) for number, line in enumerate(SNIPPET.splitlines(), start=1) if "# " in line
    ]
    got = [(int(line.split(":")[1]), line.rsplit("[", 1)[1].rstrip("]")) for line in found]
    assert got == expected, printed + errors


def test_the_library_logs_and_says_nothing_unasked():
    aloud = "import logging, sys; sys.stderr = sys.stdout"
    asked = "logging.basicConfig(format='%(name)s: %(message)s')"
    hidden = "sys.modules['fastguard._C'] = None\nfrom fastguard import backend\nbackend.unavailable('cpu', 'cpu')"
    assert python(f"{aloud}\n{hidden}") == ""
    said = python(f"{aloud}\n{asked}\n{hidden}")
    assert said.startswith("fastguard._extension: CPU ops run on the slower portable backend: "), said

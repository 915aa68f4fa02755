"""`import fastguard` is cheap, touches nothing it need not, and works where only torch is installed."""

import subprocess
import sys

BUDGET_S = 0.3

PUBLIC = "import fastguard; [getattr(fastguard, n) for n in getattr(fastguard, '__all__', ())]"


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_time_beyond_torch():
    # Processor time: the machine may be busy with other things. Up to three times: files may be cold.
    code = f"import time, torch; t = time.process_time()\n{PUBLIC}\nprint(time.process_time() - t)"
    assert any(float(python(code)) < BUDGET_S for _ in range(3))


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

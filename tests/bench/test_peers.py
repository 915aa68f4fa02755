"""Other libraries' functions are called as they are documented; a wheel that does not install loses only itself."""

from __future__ import annotations

import sys
import types
import zipfile

import pytest
import torch
import torch.nn.functional as F

from fastguard.bench.peers import PEERS, install
from fastguard.bench.work import Absent


def mean(h, w, t):
    return F.cross_entropy(h @ w.t(), t)


class Module:
    """``LigerFusedLinearCrossEntropyLoss``: called with weight, input, target."""

    def __call__(self, lin_weight, _input, target):
        return mean(_input, lin_weight, target)


class Function:
    """An autograd function of (input, weight, target)."""

    apply = staticmethod(mean)


class ByRow:
    """``LigerFusedScaledCrossEntropySM90Function``: a loss a row, and the entropy where it is asked for."""

    apply = staticmethod(lambda h, w, t: F.cross_entropy(h @ w.t(), t, reduction="none"))


LIBRARIES = {
    "liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", Module),
    "liger SM90 function": (
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "LigerFusedLinearCrossEntropySM90Function",
        Function,
    ),
    "liger SM90 scaled function": (
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "LigerFusedScaledCrossEntropySM90Function",
        ByRow,
    ),
    "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy", mean),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", mean),
}  # fmt: skip


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_there_gives_the_mean_loss_and_one_that_is_not_is_named(name, monkeypatch):
    module, attribute, stand_in = LIBRARIES[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Absent, match=f"{module}.{attribute}"):
        PEERS[name]()
    for i in range(module.count(".")):
        monkeypatch.setitem(sys.modules, ".".join(module.split(".")[: i + 1]), types.ModuleType("parent"))
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{attribute: stand_in}))
    h, w, t = torch.randn(5, 4), torch.randn(7, 4), torch.randint(7, (5,))
    assert torch.allclose(PEERS[name]()(h, w, t), PEERS["eager"]()(h, w, t))


def test_wheels_are_installed_beside_and_a_broken_one_loses_only_itself(tmp_path):
    name = "a_peer-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("a_peer.py", "here = True")
        wheel.writestr("a_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\n")
        wheel.writestr("a_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("a_peer-1.0.dist-info/RECORD", "")
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    folder, refused = install(tmp_path)
    assert (folder / "a_peer.py").read_text() == "here = True"
    assert list(refused) == ["broken-1.0-py3-none-any.whl"]

"""What is published: a complete sdist, and wheels that do what is promised with, without, and despite a compiler.

Everything is made from what git holds, not from this tree, where built files lie about. The environments are new, and
see the packages of this one through a path file: torch is not installed again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastguard

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
OPTIONS = ["--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout"),
    pytest.mark.skipif(os.name != "posix", reason="the compilers here are shell scripts"),
]


def run(*command: object, cwd: Path, fails: bool = False, **environment: str) -> str:
    """What the command prints; it must end as expected."""
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH") and not k.startswith("FASTGUARD_")}
    env |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=env, cwd=cwd, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    """Every file of the checkout that git holds or would hold."""
    listed = run("git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def source(tracked, tmp_path_factory) -> Path:
    """A clean clone."""
    clone = tmp_path_factory.mktemp("clone")
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    return clone


def hook(source: Path, call: str, **environment: str) -> str:
    """The last line that a hook of the build backend prints or returns."""
    code = f"import sys; sys.path.insert(0, '.'); import build_backend; print(build_backend.{call})"
    return run(sys.executable, "-c", code, cwd=source, **environment).splitlines()[-1]


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return folder / hook(source, f"build_sdist({str(folder)!r})")


def environment(folder: Path) -> Path:
    """The interpreter of a new environment."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    paths = {"base": str(folder), "platbase": str(folder)}
    (Path(sysconfig.get_path("purelib", "venv", paths)) / "parent.pth").write_text(sysconfig.get_path("purelib"))
    return Path(sysconfig.get_path("scripts", "venv", paths)) / "python"


def install(python: Path, what: Path, *options: str, **keywords) -> str:
    command = [sys.executable, "-m", "pip", "--python", python, "install", *OPTIONS, *options, what]
    return run(*command, cwd=what.parent, **keywords)


STATE = """
import importlib.metadata as metadata, json, pkgutil, importlib, sys, torch
import fastguard
from fastguard import doctor
for name in fastguard.__all__:
    getattr(fastguard, name)
found = metadata.distribution("fastguard-kernels")
hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
target = torch.tensor([0, 3, 10, 2, 7])
wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
error = fastguard.linear_cross_entropy(hidden, weight, target) - wanted
print(json.dumps({
    "home": fastguard.__file__, "metadata": str(found.locate_file("fastguard/__init__.py")), "version": found.version,
    "error": abs(float(error)), "torch": torch.__version__,
}))
"""


def check(python: Path, backend: str) -> str:
    """The installed package works on that backend. Returns why the kernels are absent, if they are."""
    elsewhere = python.parent
    state = json.loads(run(python, "-c", STATE, cwd=elsewhere))
    assert state["version"] == fastguard.__version__
    assert Path(state["home"]).is_relative_to(python.parents[1]) and state["home"] == state["metadata"]
    assert state["error"] < 1e-5
    assert run(elsewhere / "fastguard", "--version", cwd=elsewhere) == f"fastguard {fastguard.__version__}\n"
    found = json.loads(run(elsewhere / "fastguard", "doctor", "--json", cwd=elsewhere))
    assert {op["backend"] for op in found["ops"] if op["device"] == "cpu"} == {backend}
    return found["extension"]["reason"]


def test_the_sdist_holds_what_a_build_needs_and_no_more(sdist, tracked):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    needed = {name for name in tracked if name.startswith(("src/", "csrc/"))}
    needed |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "build_backend.py"}
    assert not needed - names
    assert not [name for name in names if name.startswith("tests") or name.endswith((".so", "_extension.txt"))]


def compiler(folder: Path, lines: str) -> str:
    """A script in the compiler's place: torch asks it for its version, and likes its name."""
    script = folder / "g++"
    script.write_text(f"#!/bin/sh\n{lines}\n")
    script.chmod(0o755)
    return str(script)


def test_with_a_compiler(sdist, tracked, tmp_path):
    quick = compiler(tmp_path, 'exec c++ "$@" -O0')  # optimised it takes minutes, and is what every other test runs
    run(sys.executable, "-m", "pip", "wheel", *OPTIONS, sdist, "-w", tmp_path, cwd=tmp_path, CXX=quick)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"fastguard_kernels-{fastguard.__version__}-cp311-abi3-")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not {name.removeprefix("src/") for name in tracked if name.startswith("src/")} - names
    assert "fastguard/_C.abi3.so" in names and "fastguard/_extension.txt" not in names
    python = environment(tmp_path / "venv")
    install(python, wheel)
    assert check(python, "cpu") is None


def test_a_failing_compiler_does_not_fail_the_install_and_is_quoted(sdist, tmp_path):
    fails = 'for given in "$@"; do [ "$given" = -c ] && echo "lens.cpp:1: error: planted" >&2 && exit 1; done'
    python = environment(tmp_path / "venv")
    install(python, sdist, CXX=compiler(tmp_path, f'{fails}\nexec c++ "$@"'))
    assert "lens.cpp:1: error: planted" in check(python, "portable")
    [tags] = [line for line in wheel_file(python).splitlines() if line.startswith("Tag:")]
    assert tags == "Tag: py3-none-any"
    # Where the kernels are required, it does.
    install(python, sdist, "--force-reinstall", CXX=str(compiler), FASTGUARD_REQUIRE_EXTENSION="1", fails=True)


def test_a_compiler_that_does_not_even_say_its_version(sdist, tmp_path):
    python = environment(tmp_path / "venv")
    install(python, sdist, CXX="/bin/false")
    assert "the compiler failed" in check(python, "portable")


def test_without_a_compiler(sdist, tmp_path):
    python = environment(tmp_path / "venv")
    install(python, sdist, CXX="no-such-c++")
    assert "no C++ compiler (no-such-c++)" in check(python, "portable")
    assert "Tag: py3-none-any" in wheel_file(python)


def test_a_build_in_isolation_asks_for_torch_only_where_it_compiles(source):
    asked = "get_requires_for_build_wheel(), build_backend.get_requires_for_build_editable()"
    both = "['torch>=2.11', 'ninja'] ['torch>=2.11', 'ninja']"
    assert hook(source, f"{asked}, build_backend.get_requires_for_build_sdist()", CXX=sys.executable) == f"{both} []"
    assert hook(source, asked, CXX="no-such-c++") == hook(source, asked, FASTGUARD_NO_EXTENSION="1") == "[] []"


def wheel_file(python: Path) -> str:
    [found] = python.parents[1].glob("lib/python*/site-packages/fastguard_kernels-*.dist-info/WHEEL")
    return found.read_text()

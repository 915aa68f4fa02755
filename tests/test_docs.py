"""The site builds, strictly, and its API pages name everything that is public."""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastguard
from fastguard import ops

ROOT = Path(__file__).parents[1]


def build(root, out):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_site_builds_and_its_links_arrive(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    for link in set(re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', home)):
        found = tmp_path / link
        assert (found / "index.html").is_file() if link.endswith("/") or link in (".", "..") else found.is_file(), link
    assert "RepNoiseLoss.preset" in home and "mask_padding" in (tmp_path / "api/losses/index.html").read_text()
    assert "fully_shard" in (tmp_path / "examples/fsdp2.py/index.html").read_text()
    assert not re.search(r'(?:src|rel="stylesheet" href)="https?:', home), "the site loads something from elsewhere"


def test_a_broken_link_fails_the_build(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", "examples", "src"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    for name, link in (("README.md", "docs/nowhere.md"), ("docs/trainers.md", "../examples/nothing.py")):
        with (tmp_path / name).open("a") as page:
            page.write(f"\n[planted]({link})\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr and "nothing.py" in done.stderr


def test_every_public_name_is_in_the_api_pages():
    shown = re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in ROOT.glob("docs/api/*.md")), re.M)
    for path in shown:
        home, name = path.rsplit(".", 1)
        assert hasattr(importlib.import_module(home), name), f"docs/api shows {path}, which is not there"
    rooms = [fastguard.directions, fastguard.nested, fastguard.trainers]
    rooms += [
        importlib.import_module(f"fastguard.ops.{op.name}") for op in pkgutil.iter_modules(ops.__path__) if op.ispkg
    ]
    public = {*fastguard._HOMES, *(name for room in rooms for name in room.__all__)}
    missing = public - {path.rsplit(".", 1)[1] for path in shown}
    assert not missing, f"docs/api does not show {sorted(missing)}"

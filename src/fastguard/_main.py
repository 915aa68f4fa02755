"""Entry point of the ``fastguard`` script: the commands; without typer, those of them that torch alone can serve."""

from __future__ import annotations

import importlib.util
import os
import sys

from fastguard import __version__

USAGE = """Usage: fastguard doctor [--json] | bench --gpu [--out DIR] [--peers DIR] [--minutes 8] [--check] | --version

The other commands need further packages: pip install 'fastguard-kernels[hf,report]'"""


def main() -> None:
    """Run the command that ``sys.argv`` names. Exits with 2 if it is none, or one that needs further packages."""
    if importlib.util.find_spec("typer") is not None:
        from fastguard import cli

        cli.main()
    else:
        sys.exit(_without_typer(sys.argv[1:]))


def _without_typer(given: list[str]) -> int:
    if given[:1] == ["bench"]:
        from fastguard.bench import command

        return command.main(given[1:])
    if given == ["--version"]:
        print(f"fastguard {__version__}")
    elif given in (["doctor"], ["doctor", "--json"]):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in cli.main; read when torch is loaded, below
        import json

        from fastguard import doctor

        found = doctor.examine()
        print(json.dumps(found, indent=2)) if "--json" in given else doctor.show(found)
    elif not given or given == ["--help"]:
        print(USAGE)
    else:
        print(f"fastguard: cannot run {' '.join(given)!r} without typer\n{USAGE}", file=sys.stderr)
        return 2
    return 0

"""A file of JSON lines: what became of each contender, written as it comes and on disk before anything else runs.

Of several lines on one contender the last counts. ``state`` is one of `STATES`; a contender whose last word is
``begun`` took its process with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATES = {
    "begun": False,  # it is being made and warmed up
    "warm": False,  # its times are those of the warm-up: it waits for its turns
    "done": True,  # it was no work to time: a check that passed, a fact
    "timed": True,
    "absent": True,
    "failed": True,
    "not reached": True,
}
"""By name, whether it is a contender's last word."""


class Journal:
    """Lines of ``file``; several processes may write."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, group: str, contender: str, state: str, **more: Any) -> None:
        """Append a line, in one write."""
        if state not in STATES:
            raise ValueError(f"state: expected one of {', '.join(STATES)}, got {state!r}")
        line = json.dumps({"group": group, "contender": contender, "state": state, **more}, ensure_ascii=False) + "\n"
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def last(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """The last line on each (group, contender), in the order of the first."""
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return {(line["group"], line["contender"]): line for line in lines}

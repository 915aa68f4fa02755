"""A model's card (README.md) with a section on the edit that it went through, and YAML front matter that names it.

What the card said is kept, below the front matter word by word; of the front matter its entries, to which ours are
added. ``base_model`` lists what has a name on the Hub: a folder of this disk says nothing there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "README.md"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def extended(card: str, record: Mapping[str, Any], tags: Sequence[str]) -> str:
    """The card of a model made from one with this ``card`` (empty: none), as ``record`` (fastguard_edit.json) tells."""
    import yaml

    front, body = _divided(card)
    called = [record["source"], *record.get("beside", {}).values()]
    ids = [name for name in dict.fromkeys(called) if _HUB_ID.fullmatch(name) and not Path(name).exists()]
    if ids:
        front |= {"base_model": ids, **({"base_model_relation": "merge"} if "merge" in tags else {})}
    there = front.get("tags") or []
    front["tags"] = list(dict.fromkeys([*(there if isinstance(there, list) else [there]), *tags]))
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10**6)
    return "\n\n".join(part for part in (f"---\n{head}---", body.strip("\n"), _section(record)) if part)


def _divided(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and the rest; what is no mapping between two lines of dashes is none."""
    import yaml

    found = _FRONT.match(card)
    if found is None:
        return {}, card
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}, card
    return (front, card[found.end() :]) if isinstance(front, dict) else ({}, card)


def _section(record: Mapping[str, Any]) -> str:
    edit = record["edit"]
    roles = {"layout": record["source"], **record.get("beside", {})}
    options = "\n".join(f"- {key}: `{json.dumps(value, ensure_ascii=False)}`" for key, value in edit["options"].items())
    rows = [
        f"| {role} | `{called}` | {_digests(record, None if role == 'layout' else role)} |"
        for role, called in roles.items()
    ]
    return (
        f"## {edit['name']}\n\n"
        f"{len(edit['tensors'])} tensors were made by `{edit['name']}` of fastguard {record['fastguard']}; the others, "
        "configuration and tokenizer are those of the first model below (*layout*).\n\n"
        f"{options}\n\n"
        "| role | model | SHA-256 of the tensors that were read, by shard written |\n| --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n\nWhole digests and the list of tensors stand in `fastguard_edit.json`.\n"
    )


def _digests(record: Mapping[str, Any], role: str | None) -> str:
    shards = record["shards"]
    found = [entry["sha256"] if role is None else entry.get("beside", {}).get(role, "") for entry in shards.values()]
    return ", ".join(f"`{digest[:12]}`" for digest in found)

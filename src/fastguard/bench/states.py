"""A model's own hidden states: recorded in one file, and read by the head in its filtered forward and backward.

What the filter saves depends on the states; beside synthetic ones (``zipf``) these are what a lens reads in a model.
The file is of safetensors: ``hidden`` [L + 1, N, D], normed, what enters each layer and what leaves the last;
``weight`` [V, D], the head's; both in bf16; ``target`` [N]; the head's scale and soft-cap as metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastguard
from fastguard.bench import head
from fastguard.bench.shapes import Shapes
from fastguard.bench.work import Group, Work

GROUP = "recorded states"
LENGTH = 512
"""Tokens of a text that a model reads at a time."""


def record(model: str, text: Path, out: Path, rows: int) -> None:
    """Write the states of a model (a folder or an id) on the first ``rows`` tokens of a text, which must have them.

    Raises ValueError for a text that is too short, and for a model whose head is not found or has a bias.
    """
    import transformers
    from safetensors.torch import save_file

    from fastguard.taps.structure import find_structure, head_parameters

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    if len(ids) <= rows:
        raise ValueError(f"text: expected more than {rows} tokens, got {len(ids)} in {text}")
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    structure = find_structure(network.to(device).eval())
    weight, bias = head_parameters(structure.head)
    if bias is not None:
        raise ValueError(f"model: expected a head without a bias, got one in {model}")
    places = (*structure.layers, structure.norm)
    found: list[list[Tensor]] = [[] for _ in places]

    def keep(i: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            found[i].append(args[0] if args else kwargs["hidden_states"])

        return hook

    hooks = [place.register_forward_pre_hook(keep(i), with_kwargs=True) for i, place in enumerate(places)]
    with torch.no_grad():
        for part in ids[:rows].split(LENGTH):
            network(input_ids=part[None].to(device), use_cache=False)
        for hook in hooks:
            hook.remove()
        hidden = torch.stack([structure.norm(torch.cat(parts, 1))[0].bfloat16().cpu() for parts in found])
    weight = weight.detach().cpu().contiguous()
    options = {"scale": str(structure.scale), **({"softcap": str(structure.softcap)} if structure.softcap else {})}
    save_file({"hidden": hidden, "weight": weight, "target": ids[1 : rows + 1]}, out, options)


def group(file: Path) -> Group:
    """A contender a state. Raises ValueError for a file that holds something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            sizes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"states: {file}: {error}") from error
    (count, rows, width), (vocabulary, features), (targets,) = (
        sizes.get(key, [None] * dims) for key, dims in (("hidden", 3), ("weight", 2), ("target", 1))
    )
    if None in (count, vocabulary, targets) or (rows, width) != (targets, features):
        raise ValueError(
            f"states: {file}: expected hidden [L, N, D], weight [V, D] and target [N] as "
            f"fastguard bench --record writes them, got {sizes}"
        )

    def prepare(shapes: Shapes) -> Callable[[str], Work]:
        with safe_open(file, "pt", shapes.device) as opened:
            weight, target = opened.get_tensor("weight"), opened.get_tensor("target")
            options: dict[str, Any] = {key: float(value) for key, value in (opened.metadata() or {}).items()}

        def make(name: str) -> Work:
            with safe_open(file, "pt", shapes.device) as opened:
                h = opened.get_slice("hidden")[int(name.rpartition(" ")[2])]
            part = head.live(h, weight, target, **options)
            leaves = h.requires_grad_(), weight.detach().requires_grad_()

            def run() -> object:
                stats = fastguard.lm_head_stats(*leaves, target, **options)
                return torch.autograd.grad(stats.cross_entropy("mean"), leaves)

            figures = {"live": part, "entropy": head.entropy(h.detach(), weight)}
            return Work(run, 2.0 * h.numel() * len(weight) * (1 + 3 * part), figures=figures)

        return make

    return Group(tuple(f"fastguard, state {i}" for i in range(count)), prepare, ("lm_head_stats",))

"""How many columns the filter keeps, and what that costs in accuracy, on SmolLM2's own activations.

    python benchmarks/filter_accuracy.py [--tol 0.05]

Prints the table of docs/performance.md: gradient of the mean cross-entropy of 256 rows of Wikipedia prose, against
``filter_tol=0``; "no tail" leaves the dropped mass out instead of handing it to the warm columns.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch

from end_to_end.step import load, prose
from fastguard.ops.lens_stats import lens_stats
from fastguard.ops.lm_head_stats import cpu
from fastguard.ops.lm_head_stats.live import LIVE

LAYERS = (1, 6, 12, 18, 24, 28, 29, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tol", type=float, default=0.05)
    tol = parser.parse_args().tol
    model, tokenizer = load()
    ids = prose(tokenizer, 4, 129)
    with torch.no_grad():
        states = model.eval()(ids[:, :-1], output_hidden_states=True, logits_to_keep=1).hidden_states
    rows = torch.arange(4 * 128).view(4, 128)[:, 64:].reshape(-1)
    target = ids[:, 1:].reshape(-1)[rows]
    weight, norm = model.lm_head.weight.detach(), model.model.norm.weight.detach()
    columns_of = cpu.CppKernels.columns

    def gradients(layer: int, filter_tol: float, tail: bool = True) -> tuple[torch.Tensor, ...]:
        kept.clear()

        def columns(self, codes, dtype):
            index, live, share = columns_of(self, codes, dtype)
            kept.append(float((codes == LIVE).double().mean()))
            return index, live, share if tail or share is None else 0 * share

        leaves = states[layer].reshape(-1, 576).clone().requires_grad_(), weight.clone().requires_grad_()
        kind = "none" if layer == len(states) - 1 else "rms"
        with mock.patch.object(cpu.CppKernels, "columns", columns):
            stats, _ = lens_stats(
                leaves[0], rows, leaves[1], target, norm_kind=kind, norm_weight=norm, norm_eps=1e-5,
                filter_tol=filter_tol,
            )  # fmt: skip
            return torch.autograd.grad(stats.cross_entropy().mean(), leaves)

    kept: list[float] = []
    print("| hidden state | live columns | dX error | dX, no tail | dW error |\n|---|---|---|---|---|")
    for layer in LAYERS:
        exact = gradients(layer, 0.0)
        bare = gradients(layer, tol, tail=False)
        filtered = gradients(layer, tol)
        dx, dw = (float((a - b).norm() / b.norm()) for a, b in zip(filtered, exact, strict=True))
        without = float((bare[0] - exact[0]).norm() / exact[0].norm())
        name = f"{layer} (output)" if layer == len(states) - 1 else str(layer)
        print(f"| {name} | {sum(kept) / len(kept):.1%} | {dx:.1e} | {without:.1e} | {dw:.1e} |", flush=True)


if __name__ == "__main__":
    main()

"""How many columns each backend's rule keeps, on SmolLM2's own activations, sink rows included.

    python benchmarks/live_columns.py

Writes benchmarks/results/cpu-live-columns.json and prints the table of docs/performance.md: over tiles of 128 rows of
Wikipedia prose, the part of the vocabulary that is live and warm under the portable ladder (exact masses) and under
the GPU scan's rule (`reference.one_pass_codes`), now and "before": rows as they come, the ladder's 1.5 octaves, and a
scan with two thresholds on a row's own masses, whose runs start from the first 2048 columns.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from end_to_end.step import load, prose
from fastguard.ops.lm_head_stats import live, order, reference
from fastguard.ops.lm_head_stats.op import TILE
from fastguard.ops.vocabulary import Head

TOL, SAMPLE, PARTS, ROUNDING = 0.05, 2048, 4, 1 - 2.0**-8
RESULT = Path(__file__).parent / "results" / "cpu-live-columns.json"


def activations(samples: int, tokens: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """(normed hidden states [samples * tokens, D] of every layer, head [V, D], targets)."""
    model, tokenizer = load()
    ids = prose(tokenizer, samples, tokens + 1)
    with torch.no_grad():
        states = model.eval()(ids[:, :-1], output_hidden_states=True, logits_to_keep=1).hidden_states
    weight, last = model.model.norm.weight.detach(), len(states) - 1
    rows = [
        s.flatten(0, 1) if i == last else weight * torch.nn.functional.rms_norm(s, s.shape[-1:], eps=1e-5).flatten(0, 1)
        for i, s in enumerate(states)
    ]
    return rows, model.lm_head.weight.detach(), ids[:, 1:].flatten()


def sample_bound(z: Tensor, target: Tensor) -> Tensor:
    """The rest lse over the columns that the GPU scan starts from."""
    return z.scatter(1, target[:, None], -math.inf)[:, live.sample(z.shape[1], SAMPLE)].logsumexp(1)


def ladder(z: Tensor, target: Tensor) -> Tensor:
    rest = z.scatter(1, target[:, None], -math.inf)
    return live.encode(torch.softmax(rest, 1), target, TOL)


def scan(z: Tensor, target: Tensor) -> Tensor:
    return reference.one_pass_codes(z, target, sample_bound(z, target), TOL, PARTS, rounding=ROUNDING)


def old_ladder(z: Tensor, target: Tensor) -> Tensor:
    mass = torch.softmax(z.scatter(1, target[:, None], -math.inf), 1)
    peak = mass.amax(0)
    peak[target] = 1.0
    for k in range(12):
        tau = 2 ** (-2 - 1.5 * k)
        if (mass * (peak < tau)).sum(1).max() <= TOL:
            return coded(peak >= tau, mass.mean(0))
    return coded(peak >= 0, mass.mean(0))


def old_scan(z: Tensor, target: Tensor) -> Tensor:
    rest = z.scatter(1, target[:, None], -math.inf)
    blocks = rest.unflatten(1, (-1, TILE))
    runs = -(-blocks.shape[1] // 16)
    known = torch.cat([s.logcumsumexp(1) for s in blocks.logsumexp(2).split(runs, 1)], 1)
    known = known.maximum(rest[:, :SAMPLE].logsumexp(1)[:, None])
    mass = torch.exp(blocks - known[:, :, None]).flatten(1)
    peak, exact = mass.amax(0), torch.softmax(rest, 1)
    peak[target] = 1.0
    for octaves in (6, 11):
        tau = 2.0 ** (math.floor(math.log2(TOL)) - octaves)
        if (exact * (mass < tau)).sum(1).max() <= TOL:
            return coded(peak >= tau, mass.mean(0))
    return coded(peak >= 0, mass.mean(0))


def coded(is_live: Tensor, mass: Tensor) -> Tensor:
    code = (254 + live.CODES_PER_OCTAVE * torch.log2(mass.clamp_min(1e-30))).round().clamp(0, 254)
    return torch.where(is_live, live.LIVE, code).to(torch.uint8)


RULES = {"ladder before": old_ladder, "ladder": ladder, "scan before": old_scan, "scan": scan}


def parts(codes: Tensor, before: bool) -> tuple[float, float]:
    """(live, warm) part of the vocabulary; before: without a cap on the warm columns."""
    index, n_live, _ = live.tile_columns(codes, torch.float32, 10**9 if before else live.WARM)
    return n_live / len(codes), (len(index) - n_live) / len(codes)


def measure(x: Tensor, weight: Tensor, target: Tensor) -> dict[str, list[float]]:
    """By rule: mean live and warm part over the tiles of rows x [N, D]."""
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in RULES}
    orders = {True: torch.arange(len(x)), False: order.by_spread(x, Head(weight))}
    for before, rows in orders.items():
        for tile in rows.split(TILE):
            z = x[tile] @ weight.t()
            for name, rule in RULES.items():
                if name.endswith("before") == before:
                    sums[name] += torch.tensor(parts(rule(z, target[tile]), before), dtype=torch.float64)
    return {name: (s / len(orders[True].split(TILE))).tolist() for name, s in sums.items()}


def main() -> None:
    states, weight, target = activations(8, 128)
    sink = torch.arange(len(target)) % 128 == 0
    found = {}
    print(f"| hidden state | sink rows | {' | '.join(RULES)} |\n|---|---|{'---|' * len(RULES)}")
    for layer in (1, 6, 12, 18, 24, 28, 29, 30):
        for name, rows in (("in", sink | True), ("out", ~sink)):
            got = measure(states[layer][rows], weight, target[rows])
            found[f"{layer} {name}"] = got
            print(f"| {layer} | {name} | {' | '.join(f'{a:.1%} / {b:.1%}' for a, b in got.values())} |", flush=True)
    note = {"torch": torch.__version__, "rows": len(target), "tol": TOL, "parts": PARTS, "live and warm": found}
    RESULT.write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()

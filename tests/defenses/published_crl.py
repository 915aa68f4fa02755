"""CRL ("Triplet") as published, written eagerly: two models, full stacks of hidden states, full logits.

An independent statement of the loss (Simko et al. 2025, arXiv 2506.11938) for tests and benchmarks; it shares no code
with fastguard. Two codes are in use, whose choices are `PORT` (TamperBench) and `ORIGINAL` (the authors'). The
authors' adversarial mining of hard negatives is left out.

With h a live and h0 a frozen hidden state of a response token, and c_l the mean of the *live* harmful states of layer l
over all response tokens of the batch (the gradient flows through it):

    alpha mean relu(d(h_b, h0_b) - d(h_b, c) + m_b)            over layers and benign response tokens
    + beta mean relu(d(h_h, c) - d(h_h, h0_h) + m_h)           over layers and harmful response tokens
    + gamma KL(frozen || live)                                  on benign tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Tensor]

PORT: dict[str, Any] = dict(
    layers=range(20, 32), benign_layers=None, distances=("cosine",) * 4, margins=(0.3, 0.5), weights=(0.5, 0.4, 0.9),
    kl="token", temperature=1.0,
)  # fmt: skip
"""TamperBench's choices. Layers beyond the model's depth are dropped there in silence; here they are an IndexError."""

ORIGINAL: dict[str, Any] = dict(
    layers=range(20, 31), benign_layers="all", distances=("norm", "cosine", "cosine", "cosine"), margins=(2.0, 3.0),
    weights=(0.5, 0.6, 0.7), kl="batchmean", temperature=2.0,
)  # fmt: skip
"""The authors' training script. With a cosine distance and a margin of 3 the harmful hinge never closes."""


class Parts(NamedTuple):
    """The loss's three terms before their weights, and the centroid [D] of each layer, of both hinges."""

    benign: Tensor
    harmful: Tensor
    kl: Tensor
    centroids: dict[int, Tensor]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1)


def norm(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x - y, dim=-1)


def mixed(x: Tensor, y: Tensor) -> Tensor:
    return norm(x, y) + 10 * (1 - F.relu(F.cosine_similarity(x, y, dim=-1)))


DISTANCES = {"cosine": cosine, "norm": norm, "mix": mixed}


def response_mask(batch: Batch) -> Tensor:
    """Bool [B, T]: the tokens that are part of a response, by ``response_mask``, else ``labels``, else all attended."""
    if "response_mask" in batch:
        return batch["response_mask"].bool()
    if "labels" in batch:
        return batch["labels"] != -100
    return batch["attention_mask"].bool()


def divergence(frozen: Tensor, live: Tensor, mask: Tensor, kind: str, temperature: float) -> Tensor:
    """KL(frozen || live) of logits [B, T, V] at the tokens of mask [B, T].

    ``token``: their mean. ``batchmean``: their sum over the number of *samples*, times temperature squared.
    """
    rows = F.kl_div(
        F.log_softmax(live / temperature, -1), F.softmax(frozen / temperature, -1), reduction="none"
    ).sum(-1)  # fmt: skip
    total = (rows * mask).sum()
    if kind == "token":
        return total / mask.sum()
    assert kind == "batchmean", kind
    return temperature**2 * total / mask.shape[0]


def published_crl(
    model: nn.Module,
    frozen: nn.Module,
    harmful: Batch,
    harmless: Batch,
    *,
    layers: Sequence[int],
    benign_layers: Sequence[int] | str | None = None,
    distances: Sequence[str] = ("cosine",) * 4,
    margins: tuple[float, float] = (0.3, 0.5),
    weights: tuple[float, float, float] = (0.5, 0.4, 0.9),
    kl: str = "token",
    temperature: float = 1.0,
    kl_on: str = "response",
) -> tuple[Tensor, Parts]:
    """The loss, with its gradient, and its parts.

    Args:
        layers: indices into ``hidden_states`` (0 is the embedding) of both triplet terms.
        benign_layers: those of the benign term where they differ; "all" for every entry.
        distances: names in `DISTANCES`: benign to its frozen self, benign to the centroid, harmful to the centroid,
            harmful to its frozen self.
        margins: of the benign and of the harmful hinge. weights: alpha, beta, gamma.
        kl, temperature: see `divergence`. kl_on: ``response`` tokens, or all ``attended`` ones as in both codes (the
            authors' on retain samples of their own).
    """
    outputs = {}
    for name, batch in (("harmful", harmful), ("harmless", harmless)):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            before = frozen(**inputs, output_hidden_states=True)
        outputs[name] = model(**inputs, output_hidden_states=True), before

    def states(name: str, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Live and frozen response states [layers, rows, D]."""
        mask = response_mask(harmful if name == "harmful" else harmless)
        live, before = (torch.stack([out.hidden_states[i][mask] for i in which]) for out in outputs[name])
        return live, before

    every = list(range(len(outputs["harmful"][0].hidden_states)))
    benign_at = list(layers) if benign_layers is None else every if benign_layers == "all" else list(benign_layers)
    own, from_centroid, to_centroid, from_own = (DISTANCES[name] for name in distances)

    centroids = {i: states("harmful", [i])[0][0].mean(0) for i in sorted({*benign_at, *layers})}

    def centroid(which: Sequence[int]) -> Tensor:
        return torch.stack([centroids[i] for i in which])[:, None]

    live, before = states("harmless", benign_at)
    benign = F.relu(own(live, before) - from_centroid(live, centroid(benign_at)) + margins[0]).mean()
    live, before = states("harmful", list(layers))
    hinge = F.relu(to_centroid(live, centroid(list(layers))) - from_own(live, before) + margins[1]).mean()

    assert kl_on in ("response", "attended"), kl_on
    mask = response_mask(harmless) if kl_on == "response" else harmless["attention_mask"].bool()
    out, out_before = outputs["harmless"]
    parts = Parts(benign, hinge, divergence(out_before.logits, out.logits, mask, kl, temperature), centroids)
    return weights[0] * parts.benign + weights[1] * parts.harmful + weights[2] * parts.kl, parts

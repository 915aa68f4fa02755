"""The published RepNoise loss, written eagerly: captured activations, full logits, 2B x 2B x F differences.

An independent statement of the algorithm for tests and benchmarks; it shares no code with fastguard. Two
forwards with ``output_hidden_states``; MLP outputs through hooks that are removed after each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def masked_ce(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token cross-entropy of logits [B, T, V]: logits and labels times mask [B, T], labels of 0 ignored."""
    logits = logits * mask[..., None].to(logits.dtype)
    labels = (ids * mask)[:, 1:]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide[:, :-1].reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=0)


def mmd(x: Tensor, z: Tensor) -> Tensor:
    """Biased MMD^2 between rows of x and z, both [B, F], with five kernels of doubling bandwidth."""
    total = torch.cat([x, z])
    n, b = total.shape[0], x.shape[0]
    distance = ((total[None] - total[:, None]) ** 2).sum(-1)
    bandwidth = distance.detach().sum() / (n * n - n) / 4
    kernel = sum(torch.exp(-distance / (bandwidth * 2.0**i)) for i in range(5))
    return (kernel[:b, :b] + kernel[b:, b:] - kernel[:b, b:] - kernel[b:, :b]).mean()


def published_loss(
    model: nn.Module,
    harmful: dict[str, Tensor],
    harmless: dict[str, Tensor],
    noise: Callable[[int], Tensor],
    *,
    norm: nn.Module,
    head: Callable[[Tensor], Tensor],
    mlps: Sequence[nn.Module],
    alpha: float = 1.0,
    beta: float = 0.001,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The loss and its components.

    noise: from a layer's index to its noise [B, T, F]. norm, head: the final norm, and the head with whatever the
    model does to its output. mlps: one module per layer. mask: [B, T] instead of the token-difference mask.
    """
    if mask is None:
        mask = harmful["input_ids"] != harmless["input_ids"]
    mask = mask.long()
    harmless_ce = masked_ce(model(**harmless).logits, harmless["input_ids"], mask)

    captured: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _m, _a, out: captured.append(out[0] if isinstance(out, tuple) else out))
        for m in mlps
    ]
    try:
        out = model(**harmful, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = out.hidden_states
    ces = [masked_ce(out.logits, harmful["input_ids"], mask)]
    ces += [masked_ce(head(norm(h)), harmful["input_ids"], mask) for h in hidden]
    harmful_sum = torch.stack(ces).sum()

    terms = []
    for i, x in enumerate(x.reshape(*mask.shape, -1) for x in captured):
        m = mask[..., None].to(x.dtype)
        z = noise(i).to(x)
        terms.append(mmd((x * m).flatten(1), (z * m).flatten(1)))
    noise_term = torch.stack(terms).mean()
    loss = harmless_ce + beta * noise_term - alpha * torch.log(harmful_sum / len(hidden) + 1)
    parts = {"harmless_ce": harmless_ce, "harmful_ce": torch.stack(ces), "noise_per_layer": torch.stack(terms)}
    return loss, {name: value.detach() for name, value in parts.items()}

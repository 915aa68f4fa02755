"""CRL, "Triplet" (Simko et al. 2025, arXiv 2506.11938): harmful states gather, away from where they were.

With h a live and h0 a frozen hidden state of a response token, c_l the mean of the live harmful states of layer l over
the batch's response tokens, through which the gradient flows, and d a distance:

    alpha mean relu(d(h, h0) - d(h, c) + m_b)       over layers and harmless response tokens: stay, and stay away from c
    + beta mean relu(d(h, c) - d(h, h0) + m_h)      over layers and harmful response tokens: leave, and gather at c
    + gamma mean KL(frozen || live)                 over harmless response tokens: predict as before

Published code keeps a second model for the frozen states, or runs a LoRA model six times a step, stacks the states of
all layers in fp32, and makes the logits of both models for the divergence. Here

* the frozen states come from one forward of ``nested.Reference``: the initial weights change places with the live ones,
  or the adapters are switched off; only response tokens at the layers that are read are kept;
* harmful and harmless samples run as one batch, in one live forward, and each layer's two hinges are taken by a tap
  where the state arises;
* the divergence is ``head_kl`` on two hidden states, without logits.

Defaults are those of TamperBench's port: distance 1 - cos, margins 0.3 and 0.5, weights 0.5, 0.4 and 0.9, hidden states
20 to 31 of 0 to 32. For other depths the same part of the model: states from 5/8 of the layers up, less the last one,
which is the final norm's. The port counts the divergence on every attended token; here on responses. It drops layers
that the model does not have in silence; here they are refused. So is a margin of 2 or more with the cosine (the
authors' script has 3), a hinge that no state can close. The authors' divergence is at temperature 2, summed over tokens
and divided by samples: their gamma is another. Their adversarial mining of hard negatives is left out.

Cost: one frozen forward, one forward and backward of both batches. Memory above a training step: twice the response
tokens' states at the layers that are read (a third in fp32 for half precision), and [V, D] of the head where it is
trained. Under DDP and FSDP2 c is the mean over all ranks' samples; published, a rank's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastguard.defenses.crl.options import Options
from fastguard.losses.joined import joined
from fastguard.methods.passes import Batch
from fastguard.methods.training import Figures, Role, Step, Training, detached
from fastguard.nested.reference import Reference
from fastguard.ops.head_kl import head_kl
from fastguard.ops.precision import accumulation_dtype
from fastguard.ops.representation_distance import representation_distance
from fastguard.over_ranks import mean_for_all, weighted
from fastguard.ranks import DataRanks
from fastguard.taps import anchor
from fastguard.taps.structure import head_parameters


class CRL(Training):
    """Gradients of one CRL step; the caller owns the optimizer.

        crl = CRL(model)                                    # before compilation, DDP and FSDP2
        figures = crl.backward(harmful=..., harmless=..., model=wrapped)
        optimizer.step(); optimizer.zero_grad()

    Args:
        model: a Hugging Face causal language model, plain or PEFT, as it is before the defense.
        alpha, beta, gamma: of the harmless hinge, the harmful hinge, and the divergence.
        benign_margin, harmful_margin: m_b and m_h; published 500 and 1500 for ``norm`` at 8B, below 2 for ``cosine``.
        distance: ``cosine``: 1 - cos, or ``norm``: the length of the difference.
        layers: indices into the L + 1 hidden states (0 is the first layer's input, L the final norm's output); None:
            from 5 L / 8 to L - 1, the port's 20 to 31 of a model of 32 layers.
        temperature: divides both models' logits in the divergence.
        reference: the model as it was; None: as it is now. seed: kept for the interface, nothing is drawn.

    Raises:
        ValueError: an argument that does not fit, named; layers that the model does not have.
    """

    roles: ClassVar[dict[str, Role]] = {"harmful": Role("harmful"), "harmless": Role("safe")}  # type: ignore[misc]

    def __init__(
        self,
        model: nn.Module,
        alpha: float = Options.alpha,
        beta: float = Options.beta,
        gamma: float = Options.gamma,
        *,
        benign_margin: float = Options.benign_margin,
        harmful_margin: float = Options.harmful_margin,
        distance: str = Options.distance,
        layers: Sequence[int] | None = Options.layers,
        temperature: float = Options.temperature,
        reference: Reference | None = None,
        seed: int = 0,
    ) -> None:
        layers = None if layers is None else tuple(layers)
        Options(alpha, beta, gamma, benign_margin, harmful_margin, distance, layers, temperature)
        super().__init__(model, seed=seed)
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature
        self.benign_margin, self.harmful_margin, self.distance = benign_margin, harmful_margin, distance
        self._last = len(self.language.structure.layers)
        self.layers = default_layers(self._last) if layers is None else layers
        if max(self.layers) > self._last:
            raise ValueError(
                f"layers: expected indices of the hidden states, 0 to {self._last}, got {max(self.layers)}"
            )
        head = self.language.structure.head
        self._head_moves = reference is not None or any(p.requires_grad for p in head.parameters())
        self.reference = Reference(model) if reference is None else reference

    def gradient(self, step: Step, *, harmful: Batch, harmless: Batch) -> Figures:  # type: ignore[override]
        """One step.

        Args:
            harmful: prompts with harmful answers. harmless: refusals and ordinary answers, of any shape. Response
                tokens are those with ``labels`` other than -100, else those that the attention mask keeps, else all.

        Returns ``loss``, ``benign_hinge``, ``harmful_hinge``, ``kl`` (before their weights).

        Raises:
            ValueError: batches that do not fit, or without response tokens. FloatingPointError: not finite.
        """
        joined, rows = _joined(harmful, harmless)
        frozen, frozen_head = self._frozen(step.model, joined, rows)
        numbers = self._numbers(step.model, joined, rows, frozen, frozen_head)
        counts = numbers.new_tensor([len(rows[1]), len(rows[0])] * len(self.layers) + [len(rows[1])])
        numbers = weighted(numbers, counts, step.ranks)
        (benign, bad), kl = numbers[:-1].view(len(self.layers), 2).mean(0), numbers[-1]
        loss = self.alpha * benign + self.beta * bad + self.gamma * kl
        step.differentiate(loss, "both batches")
        return detached(loss=loss, benign_hinge=benign, harmful_hinge=bad, kl=kl)

    def inspect(self, **batches: Batch) -> None:
        """See `Training.inspect`."""
        _joined(**batches)

    def _frozen(
        self, model: nn.Module, batch: Batch, rows: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The reference's response states, harmful ones first, and its head where the live one moves away from it."""
        both = torch.cat(rows)

        def take(index: int, x: Tensor) -> Tensor:
            read = index in self.layers or index == self._last
            return x.flatten(0, 1)[both] if read else x.new_zeros(0)

        with self.reference.consulted(model) as reference:
            states = self.language.hidden_states(batch, reference, take=take)
            structure, head = self.language.structure, None
            if self._head_moves:
                weight, bias = head_parameters(structure.head)
                whole = anchor.Source(structure.model, weight).full()
                head = whole.clone()
                if bias is not None:
                    head = _with_bias(whole, anchor.Source(structure.model, bias).full())
        return states, head

    def _numbers(
        self, model: nn.Module, batch: Batch, rows: tuple[Tensor, Tensor], frozen: tuple[Tensor, ...],
        frozen_head: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The two hinges of each layer in the order of the model's states, then the divergence; one live forward."""
        both, split = torch.cat(rows), len(rows[0])
        with self.language.tapped.call(model) as call:
            structure = self.language.structure
            weight, bias = (anchor.anchored(structure.model, p) for p in head_parameters(structure.head))

            def statistic(index: int, x: Tensor, keep: bool) -> Tensor:
                found = []
                if index in self.layers or index == self._last:
                    live = x.flatten(0, 1)[both]
                    if index in self.layers:
                        before = frozen[index]
                        found += self._hinges(live[:split], live[split:], before[:split], before[split:], call.ranks)
                    if index == self._last:
                        found.append(self._divergence(live[split:], frozen[index][split:], weight, bias, frozen_head))
                return torch.stack(found) if found else x.new_zeros(0)

            return torch.cat(call.numbers(batch, statistic))

    def _hinges(
        self, bad: Tensor, good: Tensor, bad_before: Tensor, good_before: Tensor, ranks: DataRanks | None
    ) -> list[Tensor]:
        """The harmless and the harmful hinge of one layer, each the mean over its rows [N, D]."""
        kind = "l2" if self.distance == "norm" else "cosine"
        stayed = representation_distance(good[None], good_before[None], kind=kind)[0]
        left = representation_distance(bad[None], bad_before[None], kind=kind)[0]
        wide = accumulation_dtype(bad.dtype)
        bad, good = bad.to(wide), good.to(wide)
        centre = mean_for_all(bad, ranks)
        benign = torch.relu(stayed - self._from_centre(good, centre) + self.benign_margin).mean()
        return [benign, torch.relu(self._from_centre(bad, centre) - left + self.harmful_margin).mean()]

    def _from_centre(self, states: Tensor, centre: Tensor) -> Tensor:
        """The distance [N] of states [N, D] from centre [D], with a gradient for both."""
        if self.distance == "norm":
            return torch.linalg.vector_norm(states - centre, dim=-1)
        tiny = 1e-12  # published, in both norms
        norms = torch.linalg.vector_norm(states, dim=-1).clamp_min(tiny)
        direction: Tensor = centre / torch.linalg.vector_norm(centre).clamp_min(tiny)
        return 1 - (states @ direction) / norms

    def _divergence(
        self, live: Tensor, before: Tensor, weight: Tensor | None, bias: Tensor | None, frozen_head: Tensor | None
    ) -> Tensor:
        """The mean over rows [N, D] of KL(frozen || live)."""
        assert weight is not None
        weight = weight.to(live.dtype)
        if frozen_head is not None:
            if bias is not None:  # one more feature, which is 1, so that each head has its own bias
                weight, bias = _with_bias(weight, bias.to(live.dtype)), None
                live, before = (nn.functional.pad(h, (0, 1), value=1.0) for h in (live, before))
            frozen_head = frozen_head.to(live.dtype)
        structure = self.language.structure
        return head_kl(
            live, before.to(live.dtype), weight, bias=None if bias is None else bias.to(live.dtype),
            teacher_weight=frozen_head, scale=structure.scale, softcap=structure.softcap, temperature=self.temperature,
        ).mean()  # fmt: skip


def default_layers(depth: int) -> tuple[int, ...]:
    """Hidden states from 5/8 of ``depth`` layers up, less the last one; the last where there is no other."""
    first = max(5 * depth // 8, 1)
    return tuple(range(first, depth)) or (depth,)


def _with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """[V, D + 1], with the bias as a last column."""
    return torch.cat([weight, bias[:, None]], 1)


def _joined(harmful: Batch, harmless: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Both as one batch, padded on the right to one length, and the flat positions of their response tokens."""
    given: Mapping[str, Batch] = {"harmful": harmful, "harmless": harmless}
    both = joined(given)
    answers, split = both["labels"] != -100, harmful["input_ids"].shape[0]
    length = answers.shape[1]
    rows = answers[:split].flatten().nonzero()[:, 0], answers[split:].flatten().nonzero()[:, 0] + split * length
    for name, found in zip(given, rows, strict=True):
        if len(found) == 0:
            raise ValueError(f"{name}: it has no response token")
    return both, rows

"""Random Mapping: the initial safeguard that Tamper-Resistant Safeguards start from (arXiv 2408.00761, appendix).

loss = CE(retain) + mean over all L + 1 hidden states of the mean over tokens of (1 - abs(cos(h, r(id))))

on a harmful batch, where r(id) is a fixed random direction of the token's id, the same at every depth. The states of
harmful text come to say which token stands there and no more; either sign will do.

Published: a table of V x D normal numbers; every position of the harmful batch counts, padding included; lr 1e-5
(schedule-free AdamW, 100 steps of warm-up), 1000 steps of 8. Here r(id) is row id of
``philox.gaussian_noise(V, D, seed=seed)``, made for the tokens that occur when they are needed: a function of
(seed, id), equal on every rank, and nothing to keep or to save.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastguard.defenses.random_mapping.options import Options
from fastguard.methods.passes import Batch, Loss, attended, positions
from fastguard.methods.training import Figures, Role, Step, Training
from fastguard.nested.weights import Select
from fastguard.ops.philox import BLOCK, LANES, _normals, philox4x32
from fastguard.ops.precision import accumulation_dtype


def token_directions(ids: Tensor, features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The random vector of every token: [*ids.shape, features], standard normal, a function of (seed, id).

    Row i of ``philox.gaussian_noise(V, features, seed=seed)`` where the id is i.
    """
    unique, place = ids.unique(return_inverse=True)
    groups = -(-features // BLOCK)
    group = torch.arange(groups * LANES, device=ids.device)[None]
    zero = torch.zeros_like(group)
    words = philox4x32((group, unique[:, None], zero, zero), seed)
    lanes = [*_normals(*words[:2]), *_normals(*words[2:])]
    rows = torch.stack([n.to(dtype).view(len(unique), groups, LANES) for n in lanes], dim=2)
    return rows.view(len(unique), -1)[:, :features][place]


class RandomMapping(Training):
    """Gradients of one Random Mapping step; the caller owns the optimizer.

        mapping = RandomMapping(model)                      # before compilation, DDP and FSDP2
        figures = mapping.backward(harmful=batch, retain=other)

    Cost: a forward and backward of each batch, one after the other. Memory above a training step: the directions of the
    harmful samples that pass at a time, B T D elements, in fp32 (`direction_bytes`).

    Args:
        model: a Hugging Face causal language model, also PEFT.
        mapping_weight, retain_weight: of the two terms; published 1.
        mask_padding: keep padding out of the mapping; published: it counts.
        loss: the retain batch's, of (model, batch); None: cross-entropy.
        reads: whose gradients are wanted; None: every parameter's that requires one.
        micro: samples that pass through the model at a time, at most; see ``methods.training.Training``.
        seed: of the directions.
    """

    roles: ClassVar[dict[str, Role]] = {"harmful": Role("harmful"), "retain": Role("safe")}  # type: ignore[misc]
    reads_output = True

    def __init__(
        self,
        model: nn.Module,
        *,
        mapping_weight: float = Options.mapping_weight,
        retain_weight: float = Options.retain_weight,
        mask_padding: bool = Options.mask_padding,
        loss: Loss | None = None,
        reads: Select = None,
        micro: int | None = None,
        seed: int = 0,
    ) -> None:
        Options(mapping_weight=mapping_weight, retain_weight=retain_weight, mask_padding=mask_padding)
        super().__init__(model, loss=loss, seed=seed, reads=reads, micro=micro)
        self.mapping_weight, self.retain_weight, self.mask_padding = mapping_weight, retain_weight, mask_padding
        head = self.language.structure.head
        self._features = int(head.weight.shape[1])  # type: ignore[union-attr, index]
        self._dtype = accumulation_dtype(next(model.parameters()).dtype)
        self.direction_bytes = 0

    def gradient(self, step: Step, *, harmful: Batch, retain: Batch) -> Figures:  # type: ignore[override]
        """One step: ``harmful`` and ``retain`` as ``LanguageModelLoss`` takes them.

        Returns ``loss``, ``retain_ce``, ``mapping``. Errors as in ``LanguageModelLoss``.
        """
        retained = step.passes(step.loss, retain)
        ce = step.differentiate(retained, "retain batch", step.scale * self.retain_weight)
        mapping = step.passes(lambda piece: self._mapping(piece, step.model), harmful, self._places)
        mapped = step.differentiate(mapping, "harmful batch", step.scale * self.mapping_weight)
        return {
            "loss": self.retain_weight * ce + self.mapping_weight * mapped, "retain_ce": ce, "mapping": mapped,
        }  # fmt: skip

    def _places(self, batch: Batch) -> Tensor | int:
        """Over how many tokens the mean of a batch's mapping is."""
        return positions(batch, attended(batch, self.mask_padding))

    def _mapping(self, batch: Batch, model: nn.Module) -> Tensor:
        directions = token_directions(batch["input_ids"], self._features, self.seed, self._dtype)
        self.direction_bytes = directions.numel() * directions.element_size()
        states = [directions] * (len(self.language.structure.layers) + 1)
        mask = attended(batch, self.mask_padding)
        return self.language(
            batch, None, model, distance_to=states, distance_kind="absolute_cosine", distance_mask=mask
        )

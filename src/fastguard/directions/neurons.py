"""Which MLP neurons move the stream along a direction, and how training changed that: an analysis, no defense.

With m_i the activation of neuron i of a layer (the input of its MLP's last product), v_i what the neuron writes per
unit of it (a column of that product's weight) and w a direction of length 1, the neuron's contribution is the mean over
tokens of m_i, times v_i.w. Yang et al. ("Ablation is not enough to emulate DPO", arXiv 2411.06424) compare it before
and after preference optimisation, w being a toxicity probe, and find the reduction in four groups of neurons. Between
the models before and after:

    TP-  v_i.w > 0, m_i > 0   writes along w, and less than before
    TN+  v_i.w > 0, m_i <= 0  writes against w, and more than before
    AP+  v_i.w < 0, m_i > 0   writes against w, and more than before
    AN-  v_i.w < 0, m_i <= 0  writes along w, and less than before

The names' signs are those of the change of |m_i|. A neuron belongs to a group if its activation changed so that the
projection falls, v_i.w (m_i' - m_i) < 0, which is the same as long as its activation does not cross 0, and is our
reading for those that do. Published code multiplies [B, T, F] activations with v_i.w, and sums in fp16; here one
product of the mean does, and sums are pairs of fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastguard import machine
from fastguard.directions.moments import Moments
from fastguard.directions.prompts import Batch, in_step, reading, sharded
from fastguard.ops.precision import accumulation_dtype
from fastguard.taps import Structure, find_structure
from fastguard.taps.structure import _quiet, _run, head_parameters
from fastguard.taps.taps import first_tensor

if TYPE_CHECKING:
    from fastguard.evaluation.figures import Panel

GROUPS = ("TP-", "TN+", "AP+", "AN-")


@dataclass(frozen=True)
class Neurons:
    """Of every MLP neuron of a model: its mean activation, and what it writes along a direction.

    Attributes:
        mean: [L, F] of m_i over the tokens, on the CPU, fp32 (float64 for float64 models).
        alignment: [L, F], v_i.w, likewise.
        tokens: how many there were.
    """

    mean: Tensor
    alignment: Tensor
    tokens: int

    @property
    def contribution(self) -> Tensor:
        """[L, F]: mean times alignment, what each neuron adds to the stream along w."""
        return self.mean * self.alignment


@dataclass(frozen=True)
class NeuronGroups:
    """How the contributions of one model's neurons differ from another's; see `neuron_groups`.

    Attributes:
        group: [L, F] int8, an index into `GROUPS`, -1 for neurons whose projection did not fall.
        shift: [L, F], v_i.w (m_i' - m_i), with v_i of the model before.
        counts: [L, 4] neurons of each group. reduction: [L, 4], the sum of their shifts, at most 0.
        increase: [L], the sum of the shifts that raise the projection.
        rewritten: [L], what the change of the weights adds at the activations after, the sum of m_i' (v_i' - v_i).w.
    """

    group: Tensor
    shift: Tensor
    counts: Tensor
    reduction: Tensor
    increase: Tensor
    rewritten: Tensor

    @property
    def total(self) -> Tensor:
        """[L]: by how much the mean of w.MLP(x) has changed, its bias aside."""
        return self.reduction.sum(-1) + self.increase + self.rewritten

    @property
    def shares(self) -> Tensor:
        """[4]: each group's part of the whole reduction, over all layers; NaN where nothing fell."""
        by_group = self.reduction.sum(0)
        return by_group / by_group.sum()

    def panel(self) -> Panel:
        """The groups' shifts by layer, and the increase, to be drawn by ``fastguard.evaluation.figures.svg``.

        The lines' series are 0 to 3 in the order of `GROUPS`, and 4.
        """
        from fastguard.evaluation.figures import Line, Panel

        layers = list(range(len(self.increase)))
        curves = [*self.reduction.T.tolist(), self.increase.tolist()]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(GROUPS, self.shares.tolist(), strict=True))
        return Panel(
            "Shift along the direction",
            [Line(layers, curve, series) for series, curve in enumerate(curves)],
            "layer",
            max(layers[-1], 1),
            level=0.0,
            description=f"Shift of the groups {', '.join(GROUPS)} and of the neurons that raise the projection, by "
            f"layer. Shares of the reduction: {shares}",
        )


def neurons(
    model: nn.Module,
    batches: Iterable[Batch],
    direction: Tensor,
    *,
    structure: Structure | None = None,
) -> Neurons:
    """Mean activations of all MLP neurons over the tokens of answers, in one forward a batch; nothing else is kept.

    In evaluation mode without gradients or head. Of a PEFT model the adapters are as they stand: ``with
    model.disable_adapter()`` gives those of before. In a job of several ranks each gives its share of the batches, and
    all get the same result.

    Args:
        model: any Hugging Face causal language model whose MLPs end in one product; PEFT, DDP, FSDP2, compiled.
        batches: ``input_ids`` [B, T], ``attention_mask``, and ``labels`` other than -100 at the tokens that count (the
            paper: 20 that the model has generated); without labels those that the mask keeps.
        direction: [D], or [L, D], for each layer what it writes is measured along; of any length but zero.
        structure: of ``find_structure``, where it is known already.

    Raises:
        ValueError: batches or a direction that do not fit, no token that counts, or a layer whose MLP's output is not
            one product of its neurons (experts), named.
        FloatingPointError: means or products that are not finite.
    """
    structure = find_structure(model) if structure is None else structure
    along = _unit_rows(direction, len(structure.layers), head_parameters(structure.head)[0].shape[1])
    downs = last_products(model, structure, structure.mlps)
    moments, alignment = Moments(1, len(downs)), list[Tensor | None]([None] * len(downs))
    device = next(structure.model.parameters()).device
    keep: Tensor | None = None

    def look(layer: int, module: nn.Module, given: Tensor) -> None:
        if alignment[layer] is None:
            alignment[layer] = _written_along(module, given, along[layer])
        if keep is not None:
            moments.add(0, layer, given.reshape(-1, given.shape[-1])[keep][:, None])

    handles = [
        down.register_forward_pre_hook(lambda m, args, layer=layer: look(layer, m, first_tensor(args)))
        for layer, down in enumerate(downs)
    ]
    try:
        with reading(model, structure) as prompts, torch.no_grad():
            for batch, counts in in_step(batches, sharded(model) and machine.ranks() > 1, device, "batches"):
                rows = _counted(batch) if counts else None
                keep = rows if rows is not None and len(rows) else None
                prompts.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if machine.ranks() > 1:
        moments.reduce(device)
    tokens = moments.counts[0]
    if not tokens:
        raise ValueError("batches: expected a token that counts, got none")
    written = [_of_any_rank(each, device) for each in alignment]
    if len({len(each) for each in written}) > 1:
        raise ValueError(f"model: expected MLPs of one width, got {sorted({len(each) for each in written})}")
    found = Neurons(moments.mean(0)[0], torch.stack(written).cpu(), tokens)
    for name, value in (("means", found.mean), ("products with the direction", found.alignment)):
        if not torch.isfinite(value).all():
            layer = int((~torch.isfinite(value)).any(-1).nonzero()[0])
            raise FloatingPointError(f"neurons: the {name} of layer {layer} are not finite")
    return found


def neuron_groups(before: Neurons, after: Neurons) -> NeuronGroups:
    """Sort the neurons by what changed between two models, or between a model without and with its adapters.

    Args:
        before, after: of `neurons`, along the same direction.

    Raises:
        ValueError: models of different shapes.
    """
    if before.mean.shape != after.mean.shape:
        raise ValueError(f"after: expected {tuple(before.mean.shape)} neurons, got {tuple(after.mean.shape)}")
    shift = before.alignment * (after.mean - before.mean)
    against, quiet = before.alignment < 0, before.mean <= 0
    group = torch.where(shift < 0, 2 * against.to(torch.int8) + quiet.to(torch.int8), -1).to(torch.int8)
    member = torch.stack([group == i for i in range(len(GROUPS))], -1)
    return NeuronGroups(
        group=group,
        shift=shift,
        counts=member.sum(1),
        reduction=torch.where(member, shift[..., None], 0).sum(1),
        increase=shift.clamp_min(0).sum(1),
        rewritten=(after.mean * (after.alignment - before.alignment)).sum(1),
    )


def _unit_rows(direction: Tensor, layers: int, width: int) -> Tensor:
    """[L, D] of length 1, float64."""
    if not isinstance(direction, Tensor) or direction.shape not in ((width,), (layers, width)):
        got = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(f"direction: expected [{width}] or [{layers}, {width}], got {got}")
    rows = direction.detach().double().expand(layers, width)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()) or bool((lengths == 0).any()):
        raise ValueError("direction: expected finite rows other than zero, got one that is not")
    return rows / lengths


def last_products(model: nn.Module, structure: Structure, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The module that made each block's output, with the adapters around it; found by watching, in one short forward.

    blocks: one MLP, or one attention, of each layer.
    Raises ValueError that names a layer whose block's output is not one product.
    """
    found: list[nn.Module | None] = [None] * len(blocks)
    handles: list[RemovableHandle] = []

    def watch(layer: int, block: nn.Module) -> None:
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def within(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((module, args[0], output))

        def whole(module: nn.Module, args: Any, output: Any) -> None:
            made = first_tensor(output)
            last = [
                m
                for m, x, y in calls
                if any(p.dim() == 2 for p in m.parameters())
                and x.shape[:-1] == y.shape[:-1]
                and y.numel() == made.numel()
                and torch.equal(y.reshape(made.shape), made)
            ]
            found[layer] = last[-1] if last else None
            calls.clear()

        handles.extend(m.register_forward_hook(within) for m in block.modules() if m is not block)
        handles.append(block.register_forward_hook(whole))

    try:
        for layer, block in enumerate(blocks):
            watch(layer, block)
        with reading(model, structure), _quiet(model, structure.model):
            _run(structure.model, structure.arguments, structure.vocabulary)
    finally:
        for handle in handles:
            handle.remove()
    for layer, down in enumerate(found):
        if down is None:
            raise ValueError(
                f"model: layer {layer}: expected a block ({type(blocks[layer]).__name__}) whose output is one product "
                "of its neurons; experts are not supported"
            )
    return [down for down in found if down is not None]


def _written_along(module: nn.Module, given: Tensor, along: Tensor) -> Tensor:
    """v_i.w of all neurons [F]: the gradient of w.module(m), which adapters and transposed weights are in."""
    wide = accumulation_dtype(given.dtype)
    weights = {
        name: p.detach().to(wide) if p.is_floating_point() else p.detach() for name, p in module.named_parameters()
    }
    with torch.enable_grad(), torch.autocast(given.device.type, enabled=False):
        m = torch.zeros(1, 1, given.shape[-1], dtype=wide, device=given.device, requires_grad=True)
        hooks, module._forward_pre_hooks = module._forward_pre_hooks, type(module._forward_pre_hooks)()
        try:
            written = torch.func.functional_call(module, weights, (m,))
        finally:
            module._forward_pre_hooks = hooks
        [row] = torch.autograd.grad((written[0, 0] * along.to(written)).sum(), m)
    return row[0, 0]


def _counted(batch: Batch) -> Tensor:
    """The flat positions of a batch's tokens that count."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("batches: expected input_ids of shape [B, T]")
    if "labels" in batch:
        counts = batch["labels"] != -100
    else:
        counts = batch["attention_mask"] != 0 if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    if counts.shape != ids.shape:
        raise ValueError(f"batches: expected labels and attention_mask {tuple(ids.shape)}, got {tuple(counts.shape)}")
    return counts.flatten().nonzero()[:, 0]


def _of_any_rank(row: Tensor | None, device: torch.device) -> Tensor:
    """A rank that had no batch takes what another computed."""
    if machine.ranks() > 1:
        theirs: list[Tensor | None] = [None] * machine.ranks()
        torch.distributed.all_gather_object(theirs, None if row is None else row.cpu())
        row = next(each for each in theirs if each is not None)
    assert row is not None
    return row.to(device)

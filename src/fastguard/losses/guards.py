"""What a loss, or a method that trains, refuses or warns of before it computes something that nobody asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastguard.machine import ranks
from fastguard.ranks import data_ranks
from fastguard.taps import Structure
from fastguard.taps.structure import output_head, synchronised

ENTRIES = 65_536
"""Weights that are sampled, over all parameters in proportion to their size."""

STEPS = (1, 8)
"""The optimizer's steps that are measured: the second only if the first lost too much, as the first of a warmup may."""

SHARE = 0.25
"""A warning is due where fewer of the sampled weights change."""

NARROW = (torch.bfloat16, torch.float16)


def not_negative(**values: float) -> None:
    """Raise ValueError for the first that is not a finite number of at least 0."""
    for name, value in values.items():
        if not (_is_number(value) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def a_filter_tol(value: float | None) -> None:
    """Raise ValueError unless ``value`` is None or what ``lm_head_stats`` takes as its ``filter_tol``."""
    if value is not None and not (_is_number(value) and 0 <= value < 1):
        raise ValueError(f"filter_tol: expected 0 <= filter_tol < 1 or None, got {value!r}")


def a_keep_logits_bytes(value: int | None) -> None:
    """Raise ValueError unless ``value`` is None or what ``lm_head_stats`` takes as its ``keep_logits_bytes``."""
    if value is not None and not (isinstance(value, int) and _is_number(value) and value >= 0):
        raise ValueError(f"keep_logits_bytes: expected an int >= 0 or None, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def a_batch(batch: Any, name: str) -> None:
    """Raise ValueError unless ``batch`` is a mapping of tensors."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"{name}: expected a mapping with input_ids [B, T], got {type(batch).__name__}")


def chosen(name: str, own: nn.Module, given: nn.Module | None) -> nn.Module:
    """The model that a call runs: what it was ``given``, else ``own``, on which the loss or the method stands.

    Where several ranks run and gradients are wanted, ``own`` must be what reduces them: wrapped by DDP, or sharded in
    place. Otherwise each rank would train a model of its own, without a word; who reduces gradients in another way says
    so by giving the bare model.

    Raises ValueError, in which ``name`` is called.
    """
    if given is not None:
        return given
    if ranks() > 1 and torch.is_grad_enabled() and not synchronised(own):
        if any(hasattr(p, "device_mesh") for p in own.parameters()):
            data_ranks(own)  # tensor-parallel: raises where that leaves ranks whose gradients nobody averages
        else:
            raise ValueError(
                f"{name}: model: expected the model as DDP, FSDP or accelerate have wrapped it, got none on "
                f"{ranks()} ranks, whose gradients would not be reduced; where that is meant, give the bare model"
            )
    return own


class Uncopied:
    """A loss that neither ``copy`` nor ``pickle`` may take: its hooks would stay on the model of the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__}: it cannot be copied or pickled, since its hooks are on one model; construct one "
            "on the other model, and hand on what state_dict() there is"
        )


class Places:
    """Where the parts of a model stood when they were found, to notice what takes their place afterwards.

    Hooks stay on the module that was replaced and the head's weight is read from it, without a word. The wrappers of
    checkpointing and torch.compile replace nothing, nor do parameters that FSDP2 or a checkpoint puts into a module.

    Args:
        structure: the parts. mlps: whether its MLPs count.
    """

    def __init__(self, structure: Structure, mlps: bool = False) -> None:
        self.structure = structure
        names = {module: name for name, module in structure.model.named_modules()}
        parts = [("final norm", structure.norm)]
        parts += [(f"MLP of layer {i}", mlp) for i, mlp in enumerate(structure.mlps if mlps else ())]
        self._parts = [(what, names[module], module) for what, module in parts if module in names]
        self._expected = [_bare(layer) for layer in structure.layers]
        self._layers = next((name for module, name in names.items() if _items(module) == self._expected), None)

    def check(self, loss: str) -> None:
        """Raise a RuntimeError that names the part that was replaced."""
        found = None if torch.compiler.is_compiling() else self._replaced()
        if found is not None:
            raise RuntimeError(
                f"{loss}: the model's {found} after the loss was constructed, which would read the old one; make such "
                "changes (resize_token_embeddings, a new head, adapters on it) first and construct the loss after them"
            )

    def _replaced(self) -> str | None:
        parts = self.structure
        if _bare(output_head(parts.model)) is not _bare(parts.head):
            return "head was replaced"
        weight: Tensor = parts.head.weight  # type: ignore[assignment]
        if weight.dim() == 2 and weight.shape[0] != parts.vocabulary:
            return f"head was resized from {parts.vocabulary} to {weight.shape[0]} rows"
        if self._layers is None or _items(_at(parts.model, self._layers)) != self._expected:
            return "layers were replaced"
        for what, name, module in self._parts:
            now = _at(parts.model, name)
            if now is None or _bare(now) is not _bare(module):
                return f"{what} was replaced"
        return None


def _at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _items(module: nn.Module | None) -> list[nn.Module]:
    return [_bare(item) for item in module] if isinstance(module, nn.ModuleList) else []


def _bare(module: nn.Module) -> nn.Module:
    """A module without torch's checkpoint wrapper and torch.compile around it."""
    while True:
        children = module._modules
        within = children.get("_checkpoint_wrapped_module") or children.get("_orig_mod")
        if within is None:
            return module
        module = within


class _Sample:
    """Some entries of one parameter: where, what they were, and whether their gradient was other than zero."""

    def __init__(self, parameter: nn.Parameter, count: int, seed: int) -> None:
        self.parameter = parameter
        flat = _flat(parameter)
        generator = torch.Generator(flat.device).manual_seed(seed)  # on the device: a copy from the host would wait
        self.at = torch.randint(flat.numel(), (count,), generator=generator, device=flat.device)
        self.before = flat[self.at]
        self.asked = torch.zeros_like(self.before, dtype=torch.bool)

    def note(self, parameter: Tensor) -> None:
        """The hook that torch calls when the parameter has got a gradient."""
        if parameter.grad is not None and not parameter.grad.is_sparse:
            self.asked |= _flat(parameter.grad)[self.at] != 0

    def counts(self) -> Tensor:
        """[2]: entries that had a gradient, and those of them that changed."""
        changed = _flat(self.parameter)[self.at] != self.before
        return torch.stack([self.asked.sum(), (self.asked & changed).sum()])


def _local(tensor: Tensor) -> Tensor:
    """A detached view, of a shard this rank's part."""
    whole = tensor.detach()
    return whole.to_local() if hasattr(whole, "to_local") else whole


def _flat(tensor: Tensor) -> Tensor:
    return _local(tensor).reshape(-1)


class RoundingWatch:
    """Warns once if fewer than a quarter of a narrow model's weights change in a step although they have gradients.

    A step of AdamW moves a weight by about the learning rate; the spacing of bf16 is 2^-8 to 2^-7 of a weight's size. A
    weight whose step is under half of that stays where it is, step after step, and nothing says so: at lr 8e-5, six of
    seven weights of a small pretrained model.

    Call it at the start of each training call of a loss. It costs nothing for parameters in fp32 or float64. Otherwise
    it reads 65,536 weights before and after the first step, and once more around the eighth if too few changed; the
    comparison waits for the device, at most twice a run. A step is noticed by torch's version counter of a parameter,
    so that micro-batches between steps do not count. Ranks judge their own shards, each for itself.

    Args:
        loss: its name, for the warning.
    """

    def __init__(self, loss: str) -> None:
        self.loss = loss
        self.done = False
        self._parameters: list[nn.Parameter] | None = None
        self._version = 0
        self._step = 0
        self._shares: list[float] = []
        self._samples: list[_Sample] = []
        self._hooks: list[RemovableHandle] = []

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        """See the class; ``model``: the language model under its wrappers, sharded if it is."""
        if self.done or torch.compiler.is_compiling():
            return
        if self._parameters is None:
            self._parameters = _narrow(model)
        if not self._parameters:
            self.done = True
            return
        largest = self._parameters[0]
        # Of a DTensor an optimizer's step bumps its own counter, not its part's.
        version = largest._version + _local(largest)._version
        stepped, self._version = version != self._version, version
        if self._step == 0 or stepped:
            self._step += 1
            self._measure()
            if not self.done and self._step in STEPS:
                self._arm(self._parameters)

    def _arm(self, parameters: Sequence[nn.Parameter]) -> None:
        total = sum(p.numel() for p in parameters)
        for seed, p in enumerate(parameters):
            if _flat(p).numel():
                sample = _Sample(p, max(round(ENTRIES * p.numel() / total), 1), seed)
                self._samples.append(sample)
                self._hooks.append(p.register_post_accumulate_grad_hook(sample.note))

    def _measure(self) -> None:
        if not self._samples:  # between the steps that are measured
            return
        device = self._samples[0].at.device
        asked, changed = torch.stack([sample.counts().to(device) for sample in self._samples]).sum(0).tolist()
        dtype = self._samples[0].before.dtype
        self.close()
        self._shares.append(changed / max(asked, 1))
        if not asked or self._shares[-1] >= SHARE:
            self.done = True
        elif len(self._shares) == len(STEPS):
            self.done = True
            first, last = (f"{share:.1%}" for share in self._shares)
            warnings.warn(
                f"{self.loss}: the model's {dtype} rounds most of its training away: of {asked} sampled weights that "
                f"had a gradient, {first} changed in step {STEPS[0]}, {last} in step {STEPS[1]}. Load the model with "
                "dtype=torch.float32 (autocast keeps its products in bf16), train LoRA adapters in fp32, or let the "
                "optimizer keep fp32 master weights or round stochastically, in which case this does not apply",
                stacklevel=7,
            )

    def close(self) -> None:
        """Take the hooks off the parameters and forget what they noted."""
        for hook in self._hooks:
            hook.remove()
        self._samples, self._hooks = [], []


def _narrow(model: nn.Module) -> list[nn.Parameter]:
    """The trained bf16 and fp16 parameters, largest first; if there are others, without the embedding.

    Most of its rows get no gradient.
    """
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    found = [p for p in model.parameters() if p.requires_grad and p.dtype in NARROW]
    rest = [p for p in found if p is not getattr(embedding, "weight", None)]
    return sorted(rest or found, key=lambda p: p.numel(), reverse=True)

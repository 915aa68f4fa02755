"""SOMF's mask (arXiv 2405.09055), learned on safety data with the model in memory; ``merge("somf", ...)`` reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.machine import write_atomically
from fastguard.merging.arithmetic import portions, wide
from fastguard.merging.options import Somf
from fastguard.merging.somf import Factor, moved, rescaled
from fastguard.nested.guard import derived_seed

Call = Callable[..., Any]
"""The model's forward with the masked weights."""


class SubspaceMask(nn.Module):
    """Which part of the tasks' changes to a safe model is kept, as logits to be learned; the model stays as it is.

    Under `loss` the chosen weights are safe + coefficient sum_t delta_t m / mean(m) per tensor, where m is a relaxed
    Bernoulli variable of these logits. The logits are the parameters: fp32, one a weight, 0 at first (published:
    learning rate 1e-3, DPO on safety preferences). Beside them the sum of the deltas is kept; memory and gradient are
    those of training the chosen weights in fp32.

        mask = SubspaceMask({n: p.detach() for n, p in safe.named_parameters()}, [delta])
        optimizer = torch.optim.Adam(mask.parameters(), lr=1e-3)
        mask.loss(model, batch, step=step).backward()

    Args:
        safe: the safe model's tensors by the model's names for them; those that no delta names are not read.
        deltas: of each task, its change of the chosen tensors, by the same names. Of adapters: of their factors.
        coefficient: of the changes. temperature: of the relaxation.
        objective: (call, batch) -> loss, where ``call`` is the model's forward with these weights; by default
            ``call(**batch).loss``.
        adapter: of a PEFT model whose factors are masked: its adapter's name (``default``), which files leave out.
        seed: of the draws, which are a function of it, the step and the tensor's name (on one kind of device).

    Raises:
        ValueError: no deltas, or of different names; a name that ``safe`` has not, or has in another shape; tensors
            that are no floating-point ones; coefficient or temperature out of range.
    """

    def __init__(
        self, safe: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]], *, coefficient: float = 0.3,
        temperature: float = 0.5, objective: Callable[[Call, Any], Tensor] = lambda call, batch: call(**batch).loss,
        adapter: str | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not math.isfinite(coefficient):
            raise ValueError(f"coefficient: expected a finite number, got {coefficient}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}")
        if not deltas or not deltas[0] or any(d.keys() != deltas[0].keys() for d in deltas):
            raise ValueError("deltas: expected at least one, and all of the same tensors, at least one")
        self.names = list(deltas[0])
        for name in self.names:
            if name not in safe:
                raise ValueError(f"safe: expected {name!r}, which the deltas name")
            for t in (safe[name], *(d[name] for d in deltas)):
                if t.shape != safe[name].shape or not t.is_floating_point():
                    raise ValueError(
                        f"deltas: expected {list(safe[name].shape)} in floating point for {name!r}, got "
                        f"{list(t.shape)} {t.dtype}"
                    )
        self.coefficient, self.temperature, self.objective, self.seed = coefficient, temperature, objective, seed
        self.stored = {n: n if adapter is None else n.replace(f".{adapter}.", ".") for n in self.names}
        self.safe = {name: safe[name].detach() for name in self.names}
        dtypes = {name: wide([safe[name], *(d[name] for d in deltas)]) for name in self.names}
        self.change = {n: torch.stack([d[n].detach().to(dtypes[n]) for d in deltas]).sum(0) for n in self.names}
        self._logits = nn.ParameterList(torch.zeros_like(t, dtype=torch.float32) for t in self.safe.values())

    @property
    def logits(self) -> dict[str, nn.Parameter]:
        """By tensor."""
        return dict(zip(self.names, self._logits, strict=True))

    def weights(self, step: int) -> dict[str, Tensor]:
        """The chosen weights at a step of training, in the safe ones' dtypes, differentiable in the logits."""
        return {name: self._weight(name, logits, self.draw(name, step)) for name, logits in self.logits.items()}

    def draw(self, name: str, step: int) -> Tensor:
        """A step's logistic noise for a tensor's logits, in their dtype."""
        logits = self.logits[name]
        generator = torch.Generator(logits.device)
        generator.manual_seed(derived_seed("subspace mask", self.seed, step, name))
        uniform = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        eps = torch.finfo(logits.dtype).eps
        return uniform.clamp_(eps, 1 - eps).logit_()

    def _weight(self, name: str, logits: Tensor, noise: Tensor) -> Tensor:
        change, safe = self.change[name], self.safe[name]
        mask = ((logits + noise) / self.temperature).sigmoid()
        share = mask / mask.mean().clamp_min(torch.finfo(mask.dtype).tiny)  # no 0/0 where nothing is left
        return (safe + self.coefficient * change * share).to(safe.dtype)

    def loss(self, model: nn.Module, batch: Any, *, step: int) -> Tensor:
        """The objective of the model with a step's weights.

        The model's own parameters are not written; freeze them (``requires_grad_(False)``), or they get gradients.

        Raises ValueError where the model has no such tensors, or would run again without them in the backward.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "model: expected one without gradient checkpointing, whose second forward has other weights"
            )
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, safe in self.safe.items():
            if name not in own or own[name].shape != safe.shape:
                raise ValueError(f"model: expected a parameter {name!r} of {list(safe.shape)}")
        weights = self.weights(step)

        def call(*arguments: Any, **named: Any) -> Any:
            return torch.func.functional_call(model, weights, arguments, named)

        return self.objective(call, batch)

    @torch.no_grad()
    def merged(self, export: str = "probability", seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """The chosen weights one by one, as ``merge("somf", ...)`` writes them with the saved file and these options.

        On the CPU, and apart from the rounding of the deltas that were given. Raises SettingError for bad options.
        """
        Somf(export=export, seed=seed)
        for name, logits in self.logits.items():
            out = torch.empty(logits.shape, dtype=self.safe[name].dtype)
            factor = rescaled(logits.cpu(), export, seed, self.stored[name])

            def merge(parts: list[Tensor], at: int, factor: Factor = factor) -> Tensor:
                return moved(parts[0], parts[1], at, self.coefficient, factor)

            portions([self.safe[name].cpu(), self.change[name].cpu()], out, merge)
            yield name, out

    def save(self, file: str | Path) -> None:
        """Write the logits, by tensor, to a safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors = {self.stored[n]: logits.detach().float().cpu().contiguous() for n, logits in self.logits.items()}
        write_atomically(Path(file), save(tensors, {"format": "pt"}))

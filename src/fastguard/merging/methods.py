"""The methods by name: what each reads, what it can be told, and its merge of one tensor's versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastguard.low_rank import best_part
from fastguard.merging.arithmetic import (
    Mask,
    added,
    dropped,
    elected,
    portions,
    shares,
    slerp_shares,
    store,
    trimmed,
    weighted,
    wide,
)  # fmt: skip
from fastguard.merging.inputs import Model
from fastguard.merging.parameters import in_layer, value_at
from fastguard.merging.safe_lora import projection
from fastguard.merging.somf import Logits, fused, rescaled
from fastguard.settings import Settings

Versions = Sequence[Tensor]
"""One tensor as each model has it, in the order of `Method.reads`; the layout's first."""


@dataclass(frozen=True)
class Job:
    """What a method is told: its options, the models with their parameters, how many layers they have; masks."""

    options: Any
    models: Sequence[Model]
    layers: int
    logits: Logits | None = None

    def weights(self, tensor: str) -> list[float]:
        """Of each model."""
        return [value_at("weight", m.weight, tensor, self.layers) for m in self.models]

    def densities(self, tensor: str) -> list[float]:
        """Of each model."""
        return [value_at("density", m.density, tensor, self.layers) for m in self.models]

    def coefficients(self, tensor: str) -> list[float]:
        """Of each model's change: weights, shared out or not, times the scale."""
        return [self.options.scale * w for w in shares(self.weights(tensor), self.options.normalize, tensor)]


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        title: what it computes. paper: where it is from.
        roles: other models that it needs beside ``models``: ``base``, ``aligned``, ``unaligned``.
        optional: those that it can do without.
        least, most: how many models.
        parameters: those of each model that it reads.
        models_first: whether the models, and not the first role, give the layout: configuration, tokenizer, the shards.
        merge: (job, tensor's name, its versions, out): writes into ``out``, which may be the first version.
        applies: to which tensors; the others are the layout's.
    """

    title: str
    paper: str
    merge: Callable[[Job, str, Versions, Tensor], None]
    roles: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    least: int = 1
    most: int | None = 1
    parameters: tuple[str, ...] = ()
    models_first: bool = True
    applies: Callable[[str, tuple[int, ...], Settings], bool] = lambda name, shape, options: True


def _linear(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    portions(versions, out, weighted(shares(job.weights(name), job.options.normalize, name)))


def _slerp(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    t = value_at("t", job.options.t, name, job.layers)
    base, model = versions
    portions(versions, out, weighted(slerp_shares(base, model, t)))


def _task_arithmetic(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    portions(versions, out, added(job.coefficients(name)))


def _elected(job: Job, name: str, versions: Versions, masks: Sequence[Mask], out: Tensor) -> None:
    portions(versions, out, elected(job.weights(name), masks, job.options.normalize, job.options.scale))


def _ties(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    base, *others = versions
    masks = [trimmed(base, m, density) for m, density in zip(others, job.densities(name), strict=True)]
    _elected(job, name, versions, masks, out)


def _drops(job: Job, name: str) -> list[Mask]:
    rescale, seed = job.options.rescale, job.options.seed
    return [dropped(density, rescale, seed, name, i) for i, density in enumerate(job.densities(name))]


def _dare_linear(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    portions(versions, out, added(job.coefficients(name), _drops(job, name)))


def _dare_ties(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    _elected(job, name, versions, _drops(job, name), out)


def _resta(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    """Versions: model, aligned, unaligned, and the base that it was fine-tuned from, if that is not the aligned."""
    o = job.options
    mask = dropped(1 - o.drop, o.rescale, o.seed, name, 0) if o.drop else None

    def merge(parts: list[Tensor], at: int) -> Tensor:
        model, aligned, unaligned = parts[:3]
        if mask is not None:
            base = parts[3] if len(parts) > 3 else aligned
            model = base + mask(model - base, at)
        return model + o.gamma * (aligned - unaligned)

    portions(versions, out, merge)


def _farn(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    model, base = versions
    t = job.options.weight
    before, after = slerp_shares(base, model, t) if job.options.form == "slerp" else (1 - t, t)
    portions(versions, out, weighted([after, before]))


def _safe_lora(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    dtype = wide(versions)
    model, aligned, base = (v.to(dtype) for v in versions)
    project = projection(aligned - base, job.options, name)
    if project is not None:
        store(out, aligned + project(model - aligned))


def _lox(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    dtype = wide(versions)
    model, base = versions
    matrices = zip(*(v.reshape(-1, *v.shape[-2:]) for v in (model, base)), out.view(-1, *out.shape[-2:]), strict=True)
    for mine, theirs, target in matrices:
        own = mine.to(dtype)
        part = best_part(own - theirs.to(dtype), job.options.rank, job.options.seed)
        store(target, own.add(part, alpha=job.options.coefficient))


def _somf(job: Job, name: str, versions: Versions, out: Tensor) -> None:
    o, logits = job.options, None if job.logits is None else job.logits.of(name)
    mask = None if logits is None else rescaled(logits, o.export, o.seed, name)
    portions(versions, out, fused(o.coefficient, mask))


def _of_layers(name: str, shape: tuple[int, ...], options: Settings) -> bool:
    modules: tuple[str, ...] = options.modules  # type: ignore[attr-defined]
    return len(shape) == 2 and (any(m in name for m in modules) if modules else in_layer(name))


METHODS = {
    "linear": Method(
        "the weighted mean of models", "2203.05482", _linear, most=None, parameters=("weight",)
    ),
    "slerp": Method(
        "on the arc from base to model", "", _slerp, roles=("base",), models_first=False
    ),
    "task_arithmetic": Method(
        "the base and a weighted sum of what each model changed", "2212.04089", _task_arithmetic,
        roles=("base",), most=None, parameters=("weight",), models_first=False,
    ),
    "ties": Method(
        "the same of trimmed changes that agree in sign", "2306.01708", _ties, roles=("base",), most=None,
        parameters=("weight", "density"), models_first=False,
    ),
    "dare_linear": Method(
        "the same of changes dropped at random", "2311.03099", _dare_linear, roles=("base",), most=None,
        parameters=("weight", "density"), models_first=False,
    ),
    "dare_ties": Method(
        "dropped at random, and those that agree in sign", "2311.03099", _dare_ties, roles=("base",),
        most=None, parameters=("weight", "density"), models_first=False,
    ),
    "resta": Method(
        "the model and gamma times what safety training changed", "2402.11746", _resta,
        roles=("aligned", "unaligned"), optional=("base",),
    ),
    "farn": Method(
        "between the models before and after fine-tuning", "2412.19512", _farn, roles=("base",)
    ),
    "safe_lora": Method(
        "changes against alignment's are projected", "2405.16833", _safe_lora,
        roles=("aligned", "base"), applies=_of_layers,
    ),
    "lox": Method(
        "what alignment changed, its low-rank part once more", "2506.15606", _lox, roles=("base",),
        applies=lambda name, shape, options: len(shape) >= 2,
    ),
    "somf": Method(
        "the safe model and what of each task's change a learned mask keeps", "2405.09055", _somf,
        roles=("base",), most=None, models_first=False,
    ),
}  # fmt: skip
"""The methods that ``merge`` knows, by name."""

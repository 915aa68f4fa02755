"""What a nested attack does to all parameters at once: norm, dot product, accumulation, perturbation, AdamW, copy.

Each function takes lists of plain tensors, the i-th of one list belonging to the i-th of the others: local shards
(``DTensor.to_local()``), not DTensors. None records a gradient. Checks, schemas and fakes live here, once; the backend
modules beside this file share the signatures of ``portable.py``.

Cost: every element is read once and written once, in one launch over all tensors. Bytes per element in fp32 (bf16):
``squared_norm`` 4 (2), ``dot`` 8 (4), ``accumulate_`` 12 (6, into fp32 10), ``perturb_`` 12 (6), ``adamw_`` 28 (bf16
with fp32 states 22), ``copy_`` 8 (4). Nothing is kept beyond a few numbers per chunk, except for tensors that are not
contiguous: a copy of each of those is.

Arithmetic is in fp32, or float64 where one of the i-th tensors is float64, with one rounding per element written. Sums
do not depend on the number of threads and repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops.multi_tensor.scalars import AdamW
from fastguard.ops.precision import DTYPES

Tensors = Sequence[Tensor]


@torch.no_grad()
def squared_norm(tensors: Tensors) -> Tensor:
    """The sum of the squares of all elements, the square of the global norm.

    Args:
        tensors: floating tensors of any shapes and dtypes on one device; an empty list gives 0.

    Returns:
        0-dim, good to fp32 rounding; float64 if one of the tensors is float64. NaN and Inf come through.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    _check(tensors=tensors)
    return torch.ops.fastguard.multi_tensor_squared_norm.default(list(tensors))  # type: ignore[no-any-return]


@torch.no_grad()
def dot(a: Tensors, b: Tensors) -> Tensor:
    """The sum over all elements of a * b; otherwise as ``squared_norm``.

    Raises:
        ValueError: an argument that does not fit, named; tensors of different shapes.
    """
    _check(a=a, b=b)
    return torch.ops.fastguard.multi_tensor_dot.default(list(a), list(b))  # type: ignore[no-any-return]


@torch.no_grad()
def accumulate_(accumulators: Tensors, tensors: Tensors, weight: float | Tensor = 1.0) -> None:
    """accumulator += weight * tensor, in place.

    Args:
        accumulators: fp32 or float64, or in the dtype of their tensor.
        tensors: of the same shapes, in any floating dtype.
        weight: a number or a 0-dim tensor on the same device (read there, without waiting for it) or on the CPU.

    Raises:
        ValueError: an argument that does not fit, named; an accumulator narrower than its tensor.
    """
    _check(accumulators=accumulators, tensors=tensors)
    for i, (a, t) in enumerate(zip(accumulators, tensors, strict=True)):
        if a.dtype not in (torch.float32, torch.float64, t.dtype):
            raise ValueError(f"accumulators[{i}]: expected float32, float64 or {t.dtype}, got {a.dtype}")
    torch.ops.fastguard.multi_tensor_accumulate_.default(
        list(accumulators), list(tensors), *_scalar("weight", weight, tensors)
    )


@torch.no_grad()
def perturb_(
    tensors: Tensors,
    directions: Tensors,
    scale: float | Tensor,
    *,
    source: Tensors | None = None,
    through: torch.dtype | None = None,
) -> Tensor:
    """tensor <- source + scale * direction, rounded to its dtype, and what became of the step in the rounding.

    A small step over all weights is lost in bf16: the spacing of weights near 0.02 is 1.2e-4. What was intended is
    compared with what was realised, so that the caller can refuse such a step or write it from fp32 masters.

    Args:
        tensors: written; floating dtypes.
        directions: of the same shapes, in any floating dtype.
        scale: a number or a 0-dim tensor on the same device (read there, without waiting for it) or on the CPU.
        source: what the step starts from, such as fp32 masters of bf16 tensors; None is the tensors themselves.
        through: the dtype in which the forward sees the tensors, such as bfloat16 where it casts fp32 weights; None
            is their own. The tensors are not rounded to it; the realised step is.

    Returns:
        [3], fp32 (float64 if one of the tensors is float64), sums over everything of intended^2, realised^2 and
        intended * realised, with intended = scale * direction and realised = new - old value of ``tensors``, both
        as ``through`` has them. The realised step's cosine is s[2] / sqrt(s[0] s[1]).

    Raises:
        ValueError: an argument that does not fit, named.
    """
    _check(tensors=tensors, directions=directions, source=source)
    if through is not None and through not in DTYPES:
        raise ValueError(f"through: expected a dtype of {', '.join(map(str, DTYPES))} or None, got {through}")
    base = None if source is None else list(source)
    return torch.ops.fastguard.multi_tensor_perturb_.default(  # type: ignore[no-any-return]
        list(tensors), list(directions), *_scalar("scale", scale, tensors), base, through
    )


@torch.no_grad()
def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step: int,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One step of ``torch.optim.AdamW`` (Loshchilov and Hutter 2019): decoupled decay, then Adam.

    Args:
        params: written; grads: read; exp_avgs, exp_avg_sqs: the moments, read and written, zero before the first
            step. Each in any floating dtype; the update uses the moments as they are before they are rounded.
        step: counts from 1.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    _check(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if step < 1:
        raise ValueError(f"step: expected 1 or more, got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected 0 <= {name} < 1, got {beta}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    torch.ops.fastguard.multi_tensor_adamw_.default(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), step, lr, beta1, beta2, eps, weight_decay
    )


@torch.no_grad()
def copy_(destinations: Tensors, sources: Tensors) -> None:
    """destination <- source, bit for bit, NaN payloads included.

    Args:
        destinations, sources: the same shapes and dtypes (any), each list on one device. Between the host and a GPU,
            pinned host memory is copied asynchronously; the call waits only where the destination is the host.

    Raises:
        ValueError: an argument that does not fit, named.
    """
    _check_lists(destinations=destinations, sources=sources)
    for i, (d, s) in enumerate(zip(destinations, sources, strict=True)):
        if d.dtype != s.dtype:
            raise ValueError(f"sources[{i}]: expected the dtype of destinations[{i}] ({d.dtype}), got {s.dtype}")
    torch.ops.fastguard.multi_tensor_copy_.default(list(destinations), list(sources))


def _check_lists(**lists: Tensors | None) -> None:
    """Raise a ValueError unless the lists hold plain tensors of equal shapes, each list on one device."""
    given = {name: tensors for name, tensors in lists.items() if tensors is not None}
    first = next(iter(given))
    for name, tensors in given.items():
        if isinstance(tensors, Tensor):
            raise ValueError(f"{name}: expected a list of tensors, got one tensor")
        if len(tensors) != len(given[first]):
            raise ValueError(f"{name}: expected {len(given[first])} tensors, as many as {first}, got {len(tensors)}")
    # Whole lists are compared, and searched for the culprit only where that fails: models have hundreds of tensors.
    shapes = [t.shape for t in given[first]]
    for name, tensors in given.items():
        if any(hasattr(kind, "to_local") for kind in {type(t) for t in tensors}):
            raise ValueError(f"{name}: expected local tensors, got DTensors; pass their to_local()")
        _expect(name, tensors, [t.layout == torch.strided for t in tensors], "a strided tensor", lambda t: t.layout)
        device = tensors[0].device if tensors else None
        _expect(name, tensors, [t.device == device for t in tensors], f"device {device}", lambda t: t.device)
        if [t.shape for t in tensors] != shapes:
            same = [t.shape == s for t, s in zip(tensors, shapes, strict=True)]
            _expect(name, tensors, same, f"the shape of its partner in {first}", lambda t: tuple(t.shape))


def _expect(name: str, tensors: Tensors, fits: list[bool], expected: str, found: Callable[[Tensor], Any]) -> None:
    if not all(fits):
        i = fits.index(False)
        raise ValueError(f"{name}[{i}]: expected {expected}, got {found(tensors[i])}")


def _check(**lists: Tensors | None) -> None:
    """Raise a ValueError unless the lists hold floating tensors of equal shapes on one device."""
    _check_lists(**lists)
    expected = f"a dtype of {', '.join(map(str, DTYPES))}"
    given = {name: tensors for name, tensors in lists.items() if tensors}
    for name, tensors in given.items():
        _expect(name, tensors, [t.dtype in DTYPES for t in tensors], expected, lambda t: t.dtype)
    devices = {name: tensors[0].device for name, tensors in given.items()}
    for name, device in devices.items():
        first = next(iter(devices))
        if device != devices[first]:
            raise ValueError(f"{name}: expected the device of {first}, {devices[first]}, got {device}")


def _scalar(name: str, value: float | Tensor, tensors: Tensors) -> tuple[float, Tensor | None]:
    """A number or a 0-dim tensor as the two arguments of a schema."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.dim() != 0 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a number or a 0-dim floating tensor, got {value.dtype} {tuple(value.shape)}"
        )
    if value.device.type != "cpu" and tensors and value.device != tensors[0].device:
        raise ValueError(f"{name}: expected device {tensors[0].device} or cpu, got {value.device}")
    return 1.0, value


def _known(value: float, tensor: Tensor | None) -> float | Tensor:
    """The number if the host knows it, else the tensor on the device."""
    if tensor is None:
        return value
    return float(tensor) if tensor.device.type == "cpu" else tensor


def _wide(*lists: Tensors | None) -> torch.dtype:
    double = any(t.dtype == torch.float64 for tensors in lists for t in tensors or ())
    return torch.float64 if double else torch.float32


def _device(tensors: Tensors) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _dense(tensors: Tensors) -> list[Tensor]:
    """Contiguous tensors of the same values."""
    return [t.contiguous() for t in tensors]


@contextmanager
def _written(name: str, tensors: Tensors) -> Iterator[list[Tensor]]:
    """Contiguous tensors to write to; what is written ends up in ``tensors``."""
    if len({t.data_ptr() for t in tensors}) < len(tensors):
        addresses = [t.data_ptr() for t in tensors if t.numel()]
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"{name}: expected each tensor once, got one twice (list tied parameters once)")
    dense = _dense(tensors)
    strided = [(t, d) for t, d in zip(tensors, dense, strict=True) if t is not d]
    for t, _ in strided:
        if any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"{name}: expected memory of its own for each element, got strides {t.stride()}")
    yield dense
    for t, d in strided:
        t.copy_(d)
    torch.autograd.graph.increment_version(tensors)


def _register(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define ``fastguard::multi_tensor_<schema>``, for all devices.

    Not by ``torch.library.custom_op``: what it does for each tensor of a list takes longer (measured: 0.8 us against
    0.2 us per mutated tensor) than a small tensor takes to be read, and it has no optional lists.
    """
    name, arguments = schema.split("(", 1)
    qualified = f"fastguard::multi_tensor_{name}"
    torch.library.define(qualified, f"({arguments}")
    torch.library.register_fake(qualified, fake)
    return lambda function: torch.library.impl(qualified, "CompositeExplicitAutograd", function) or function


def _nothing(*_: Any) -> None:
    """The fake of an op that only writes."""


def _fake_sum(*lists: Tensors) -> Tensor:
    return torch.empty((), dtype=_wide(*lists), device=_device(lists[0]))


def _fake_perturb(
    tensors: Tensors, directions: Tensors, _scale: Any, _tensor: Any, source: Any, _through: Any
) -> Tensor:
    return torch.empty(3, dtype=_wide(tensors, directions, source), device=_device(tensors))


@_register("squared_norm(Tensor[] tensors) -> Tensor", _fake_sum)
def _squared_norm(tensors: Tensors) -> Tensor:
    return backend.choose("multi_tensor", _device(tensors)).squared_norm(_dense(tensors))  # type: ignore[no-any-return]


@_register("dot(Tensor[] a, Tensor[] b) -> Tensor", _fake_sum)
def _dot(a: Tensors, b: Tensors) -> Tensor:
    return backend.choose("multi_tensor", _device(a)).dot(_dense(a), _dense(b))  # type: ignore[no-any-return]


@_register("accumulate_(Tensor(a!)[] accumulators, Tensor[] tensors, float weight, Tensor? by) -> ()", _nothing)
def _accumulate(accumulators: Tensors, tensors: Tensors, weight: float, by: Tensor | None) -> None:
    impl = backend.choose("multi_tensor", _device(tensors))
    with _written("accumulators", accumulators) as written:
        impl.accumulate_(written, _dense(tensors), _known(weight, by))


@_register(
    "perturb_(Tensor(a!)[] tensors, Tensor[] directions, float scale, Tensor? by, Tensor[]? source, "
    "ScalarType? through) -> Tensor",
    _fake_perturb,
)
def _perturb(
    tensors: Tensors,
    directions: Tensors,
    scale: float,
    by: Tensor | None,
    source: Tensors | None,
    through: torch.dtype | None,
) -> Tensor:
    impl = backend.choose("multi_tensor", _device(tensors))
    base = None if source is None else _dense(source)
    with _written("tensors", tensors) as written:
        return impl.perturb_(written, _dense(directions), _known(scale, by), base, through)  # type: ignore[no-any-return]


@_register(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, int step, float lr, "
    "float beta1, float beta2, float eps, float weight_decay) -> ()",
    _nothing,
)
def _adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    impl = backend.choose("multi_tensor", _device(params))
    scalars = AdamW.at(step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    with (
        _written("params", params) as p,
        _written("exp_avgs", exp_avgs) as m,
        _written("exp_avg_sqs", exp_avg_sqs) as v,
    ):
        impl.adamw_(p, _dense(grads), m, v, scalars)


@_register("copy_(Tensor(a!)[] destinations, Tensor[] sources) -> ()", _nothing)
def _copy(destinations: Tensors, sources: Tensors) -> None:
    to, start = _device(destinations), _device(sources)
    with _written("destinations", destinations) as written:
        if to == start:
            backend.choose("multi_tensor", to).copy_(written, _dense(sources))
        else:
            _transfer(written, _dense(sources))


def _transfer(destinations: list[Tensor], sources: list[Tensor]) -> None:
    """Between devices: all copies are queued, then waited for together if it is the host that gets them."""
    torch._foreach_copy_(destinations, sources, non_blocking=True)
    if destinations[0].device.type == "cpu":
        torch.accelerator.synchronize(sources[0].device)

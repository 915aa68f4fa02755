"""Every op on a device against its float64 specification, on fresh random data: each of `CHECKS` yields `Result`.

The bounds are those of ``agreement``, which the test suite uses as well. Head ops are checked exact
(``filter_tol=0``) and, on hidden states whose rest falls as a model's, as they are by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastguard
from fastguard import backend
from fastguard.bench import zipf
from fastguard.bench.agreement import EPS, disagreement
from fastguard.directions import orthonormalise
from fastguard.ops import multi_tensor
from fastguard.ops.abs_weight_grad import reference as abs_weight_grad_spec
from fastguard.ops.add_project_rms_norm import reference as add_project_spec
from fastguard.ops.class_moments import reference as class_moments_spec
from fastguard.ops.column_norms import reference as column_norms_spec
from fastguard.ops.gaussian_mmd import reference as mmd_spec
from fastguard.ops.gram import reference as gram_spec
from fastguard.ops.head_kl import reference as head_kl_spec
from fastguard.ops.lens_stats import reference as lens_spec
from fastguard.ops.linear_cross_entropy import reference as cross_entropy_spec
from fastguard.ops.lm_head_stats import reference as head_spec
from fastguard.ops.masks import reference as masks_spec
from fastguard.ops.multi_tensor import reference as multi_tensor_spec
from fastguard.ops.philox import gaussian_noise
from fastguard.ops.project_out import reference as project_out_spec
from fastguard.ops.representation_distance import reference as distance_spec
from fastguard.ops.threshold_select import reference as select_spec
from fastguard.ops.vocabulary import Norm

FILTERED = 0.1
"""Relative error that a gradient with the default filter may have, which is to drop 5% of each row's rest."""


class Result(NamedTuple):
    """A tensor that an op made, what float64 makes of the same inputs, and what plain PyTorch does in its dtype.

    within: the relative error that is allowed where it is a promise of the op's own.
    """

    name: str
    actual: Tensor
    exact: Tensor
    peer: Tensor | None
    within: float | None = None

    def wrong(self) -> str | None:
        """What is wrong with it."""
        ulps = 32.0 if self.within is None else self.within / EPS[self.actual.dtype]
        return disagreement(self.actual, self.exact, self.peer, ulps=ulps)


class Case:
    """Inputs of a check: where, in which dtype and how large (N, D, V); all drawn from ``seed``."""

    def __init__(self, device: str, dtype: torch.dtype, rows: int, width: int, vocabulary: int, seed: int) -> None:
        self.device, self.dtype, self.rows, self.width, self.vocabulary = device, dtype, rows, width, vocabulary
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device, generator=self.generator).to(dtype or self.dtype)

    def integers(self, most: int, *shape: int) -> Tensor:
        """From 0 to below ``most``."""
        return torch.randint(0, most, shape, device=self.device, generator=self.generator)

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, a head that makes logits of size 3 of them, and targets, one of which is none."""
        target = self.integers(self.vocabulary, self.rows)
        target[1] = -100
        hidden = 3 / self.width**0.5 * self.normal(self.rows, self.width)
        return hidden.to(self.dtype), self.normal(self.vocabulary, self.width), target

    def differentiated(
        self, ours: Callable[..., Any], spec: Callable[..., Any], inputs: Mapping[str, Tensor],
        outputs: Sequence[str] = ("value",), within: float | None = None,
    ) -> Iterator[Result]:  # fmt: skip
        """Outputs, and the gradients of all inputs under random upstream gradients; ``within`` is of the gradients."""
        upstream: list[Tensor] = []

        def at(function: Callable[..., Any], leaves: Sequence[Tensor]) -> list[Tensor]:
            leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
            found = function(*leaves)
            values = [found] if isinstance(found, Tensor) else list(found)
            if not upstream:
                upstream.extend(self.normal(*value.shape, dtype=torch.float64) for value in values)
            given = [g.to(value.dtype) for g, value in zip(upstream, values, strict=True)]
            return [v.detach() for v in values] + list(torch.autograd.grad(values, leaves, given))

        tensors = list(inputs.values())
        mine, peer = at(ours, tensors), at(spec, tensors)
        exact = at(spec, [t.double() for t in tensors])
        names = [*outputs, *(f"gradient of {name}" for name in inputs)]
        for i, name in enumerate(names):
            yield Result(name, mine[i], exact[i], peer[i], within if i >= len(outputs) else None)


def lm_head_stats(case: Case) -> Iterator[Result]:
    """All outputs, with bias, scale and soft-cap: exact, and by live columns with next to nothing dropped."""
    options: dict[str, Any] = {"scale": 1.3, "softcap": 15.0}
    bias = case.normal(case.vocabulary)
    plain = case.head()
    read = zipf.reading(case.rows, case.width, case.vocabulary, case.generator)
    peaked = read.hidden.to(case.dtype), read.head.to(case.dtype), read.target
    for name, (hidden, head, target), tol in (("exact", plain, 0.0), ("filtered", peaked, 1e-3)):
        for result in case.differentiated(
            lambda h, w, b, target=target, tol=tol: fastguard.lm_head_stats(
                h, w, target, bias=b, filter_tol=tol, with_mean=True, **options
            ),
            lambda h, w, b, target=target: head_spec.lm_head_stats(h, w, target, b, **options),
            {"hidden": hidden, "weight": head, "bias": bias},
            ("lse", "rest_lse", "target_logit", "mean_logit"), 0.02 if tol else None,
        ):  # fmt: skip
            yield result._replace(name=f"{name} {result.name}")


def lens_stats(case: Case) -> Iterator[Result]:
    """Some rows through a final norm."""
    hidden, head, target = case.head()
    rows = torch.randperm(case.rows, device=case.device, generator=case.generator)[: case.rows // 2 + 1]
    norm = 1 + 0.1 * case.normal(case.width, dtype=torch.float32)
    yield from case.differentiated(
        lambda h, w, n: fastguard.lens_stats(h, rows, w, target[rows], norm_weight=n, filter_tol=0.0)[0][:3],
        lambda h, w, n: lens_spec.lens_stats(h, rows, w, target[rows], norm_weight=n)[:3],
        {"hidden": hidden, "weight": head / case.width**0.5, "norm weight": norm.to(case.dtype)},
        ("lse", "rest_lse", "target_logit"),
    )


def linear_cross_entropy(case: Case) -> Iterator[Result]:
    """Exact, then with the default filter."""
    plain = case.head()
    read = zipf.reading(case.rows, case.width, case.vocabulary, case.generator)
    peaked = read.hidden.to(case.dtype), read.head.to(case.dtype), read.target
    for name, (hidden, head, target), tol in (("exact", plain, 0.0), ("filtered", peaked, None)):
        for result in case.differentiated(
            lambda h, w, target=target, tol=tol: fastguard.linear_cross_entropy(h, w, target, filter_tol=tol),
            lambda h, w, target=target: cross_entropy_spec.linear_cross_entropy(h, w, target),
            {"hidden": hidden, "weight": head}, ("loss",), FILTERED if tol is None else None,
        ):  # fmt: skip
            yield result._replace(name=f"{name} {result.name}")


def final_norm(case: Case) -> Iterator[Result]:
    """Rows gathered and normed, and the gradients; no op of its own, so that its backend is called as head ops do."""
    impl = backend.choose("final_norm", torch.device(case.device))
    rows = torch.randperm(case.rows, device=case.device, generator=case.generator)[: case.rows // 2 + 1]
    x, grad = case.normal(case.rows, case.width), case.normal(len(rows), case.width, dtype=torch.float32)
    weight, shift = 1 + 0.1 * case.normal(case.width), case.normal(case.width)

    def spec(kind: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, *bias)]
        out = lens_spec.final_norm(leaves[0][rows], Norm(kind, leaves[1], leaves[2] if bias else None, 1e-6))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    for kind in ("rms", "rms_offset", "layer"):
        bias = [shift] if kind == "layer" else []
        norm = Norm(kind, weight, shift if bias else None, 1e-6)
        mine = [impl.forward(x, rows, norm, case.dtype), *impl.backward(grad, x, rows, norm)]
        names = ("rows", "gradient", "weight's gradient", "bias's gradient")
        for name, *found in zip(names, mine, spec(kind, torch.float64), spec(kind, case.dtype), strict=False):
            yield Result(f"{kind} {name}", *found)


def head_kl(case: Case) -> Iterator[Result]:
    """A student near its teacher."""
    teacher, head, _ = case.head()
    student = teacher + 0.1 * case.normal(*teacher.shape)
    yield from case.differentiated(
        lambda s, w: fastguard.head_kl(s, teacher, w),
        lambda s, w: head_kl_spec.head_kl(s, teacher.to(s.dtype), w, teacher_weight=head.to(s.dtype)),
        {"student": student, "weight": head},
    )


def gaussian_mmd(case: Case) -> Iterator[Result]:
    """Noise that is remade, a mask, two layers."""
    samples, tokens = 3, 2 + case.rows // 64
    x = case.normal(2, samples, tokens * case.width)
    mask = case.integers(4, samples, tokens) > 0
    call = torch.tensor(3, device=case.device)
    layers = [gaussian_noise(samples, x.shape[2], seed=7, call=call, layer=i, dtype=torch.float64) for i in range(2)]
    yield from case.differentiated(
        lambda x: fastguard.gaussian_mmd(x, mask, seed=7, call=call),
        lambda x: mmd_spec.gaussian_mmd(x, torch.stack(layers).to(x.dtype), mask),
        {"x": x},
    )


def multi_tensor_ops(case: Case) -> Iterator[Result]:
    """Lists of odd sizes, in two dtypes."""
    shapes = [(case.rows, case.width), (case.width * 3 + 1,), (7,)]

    def lists(count: int, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
        return [[case.normal(*shape, dtype=dtype) for shape in shapes] for _ in range(count)]

    a, b = lists(2)
    near = [x + 0.1 * y for x, y in zip(a, b, strict=True)]  # so that the sum does not cancel
    for name, given in (("squared_norm", (a,)), ("dot", (a, near))):
        yield Result(name, getattr(multi_tensor, name)(*given), getattr(multi_tensor_spec, name)(*given), None, 1e-5)
    wide = lists(4, torch.float32)
    written: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[list[Tensor]], dict[str, Any]]] = {
        "accumulate_": (multi_tensor.accumulate_, multi_tensor_spec.accumulate_, [wide[0], a], {"weight": 0.3}),
        "perturb_": (multi_tensor.perturb_, multi_tensor_spec.perturb_, [b, a], {"scale": 0.1}),
        "adamw_": (
            multi_tensor.adamw_, multi_tensor_spec.adamw_,
            [wide[1], a, wide[2], [t.square() for t in wide[3]]],
            {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
        ),
        "copy_": (multi_tensor.copy_, multi_tensor_spec.copy_, [lists(1)[0], a], {}),
    }  # fmt: skip
    for name, (own, spec, lists_of, options) in written.items():
        mine, exact = ([[t.clone() for t in each] for each in lists_of] for _ in range(2))
        found, wanted = own(*mine, **options), spec(*exact, **options)
        if found is not None:
            yield Result(f"{name} sums", found, wanted, None, 1e-4)
        for i, (got, want) in enumerate(zip(chain(*mine), chain(*exact), strict=True)):
            yield Result(f"{name} {i}", got, want.double(), None)


def representation_distance(case: Case) -> Iterator[Result]:
    """Both kinds, some rows masked."""
    a, b = case.normal(2, case.rows, case.width), case.normal(2, case.rows, case.width)
    mask = case.integers(4, case.rows) > 0
    for kind in ("l2", "cosine"):
        for result in case.differentiated(
            lambda a, kind=kind: fastguard.representation_distance(a, b, mask, kind=kind),
            lambda a, kind=kind: distance_spec.representation_distance(a, b, mask, kind),
            {"a": a},
        ):
            yield result._replace(name=f"{kind} {result.name}")


def basis_of(case: Case, directions: int = 3) -> Tensor:
    """Orthonormal rows, as wide as their arithmetic is."""
    return orthonormalise(case.normal(directions, case.width, dtype=torch.float32))


def project_out(case: Case) -> Iterator[Result]:
    """Linear, and with each row's own basis and its norm kept."""
    x, bases = case.normal(case.rows, case.width), torch.stack([basis_of(case), basis_of(case)])
    index = case.integers(3, case.rows) - 1
    forms: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "linear": (bases[0].clone(), {}),
        "norms kept": (bases, {"basis_index": index, "preserve_norm": True}),
    }
    for name, (basis, options) in forms.items():
        for result in case.differentiated(
            lambda x, basis=basis, options=options: fastguard.project_out(x, basis, **options),
            lambda x, basis=basis, options=options: project_out_spec.project_out(x, basis, **options),
            {"x": x},
        ):
            yield result._replace(name=f"{name} {result.name}")


def add_project_rms_norm(case: Case) -> Iterator[Result]:
    """The stream and its norm."""
    basis, weight = basis_of(case), 1 + 0.1 * case.normal(case.width)
    yield from case.differentiated(
        lambda r, u, w: fastguard.add_project_rms_norm(r, u, basis, w, 1e-6),
        lambda r, u, w: add_project_spec.add_project_rms_norm(r, u, basis, w, 1e-6),
        {"residual": case.normal(case.rows, case.width), "update": case.normal(case.rows, case.width),
         "weight": weight}, ("stream", "norm"),
    )  # fmt: skip


def class_moments(case: Case) -> Iterator[Result]:
    """Two batches one after the other, against all samples at once."""
    classes, positions = 2, (-1, -3)
    x = case.normal(2 * case.rows, 4, case.width)
    label = case.integers(classes + 1, len(x)) - 1
    shape = (classes, len(positions), case.width)
    count = torch.zeros(classes, dtype=torch.int64, device=case.device)
    mean, mean_rest, second, second_rest = (torch.zeros(shape, device=case.device) for _ in range(4))
    for rows in (slice(case.rows), slice(case.rows, None)):
        fastguard.class_moments_(
            count, mean, mean_rest, x[rows], label[rows], positions=positions, second=second, second_rest=second_rest
        )
    exact = class_moments_spec.moments(x.double(), label, classes, torch.tensor([positions], device=case.device))
    yield Result("count", count.double(), exact[0].double(), None)
    yield Result("mean", mean.double() + mean_rest, exact[1], None, 1e-6)
    yield Result("second", second.double() + second_rest, exact[2], None, 1e-6)


def _samples(case: Case) -> tuple[int, Tensor]:
    """Tokens of each of two samples, and the bounds of the samples, the second of them padded."""
    tokens = case.rows // 2
    return tokens, torch.tensor([[0, tokens], [tokens, 2 * tokens - 1]], device=case.device)


def abs_weight_grad(case: Case) -> Iterator[Result]:
    """All three sums over samples of unequal lengths."""
    tokens, bounds = _samples(case)
    outputs = case.width // 2
    grad, x = case.normal(2 * tokens, outputs), case.normal(2 * tokens, case.width)
    sums = [torch.zeros(outputs, case.width, device=case.device) for _ in range(3)]
    fastguard.abs_weight_grad_(sums[0], grad, x, bounds=bounds, squared=sums[1], signed=sums[2])
    exact = abs_weight_grad_spec.sums(grad.double(), x.double(), bounds)
    peer = abs_weight_grad_spec.sums(grad, x, bounds)
    for name, got, want, same in zip(("score", "squared", "signed"), sums, exact, peer, strict=True):
        yield Result(name, got, want, same)
    alone = torch.zeros_like(sums[0])
    fastguard.abs_weight_grad_(alone, grad, x, bounds=bounds)
    yield Result("score alone", alone, exact[0], peer[0])  # in larger tiles


def column_norms(case: Case) -> Iterator[Result]:
    """The sums, and the least and greatest of a sample."""
    tokens, bounds = _samples(case)
    x = case.normal(2 * tokens, case.width)
    sums, least, greatest = (torch.full((case.width,), at, device=case.device) for at in (0.0, torch.inf, -torch.inf))
    fastguard.column_norms_(sums, x, bounds=bounds, least=least, greatest=greatest)
    exact = column_norms_spec.squares(x.double(), bounds)
    yield Result("sums", sums, exact.sum(0), None)
    yield Result("least", least, exact.amin(0), None)
    yield Result("greatest", greatest, exact.amax(0), None)


def gram(case: Case) -> Iterator[Result]:
    """Rows of two samples."""
    tokens, bounds = _samples(case)
    x = case.normal(2 * tokens, case.width)
    matrix = torch.zeros(case.width, case.width, device=case.device)
    fastguard.gram_(matrix, x, bounds=bounds)
    yield Result("gram", matrix, gram_spec.gram(x.double(), bounds), gram_spec.gram(x.float(), bounds))


def threshold_select(case: Case) -> Iterator[Result]:
    """Of the model and of each row, by |w| x score; scores are rounded, so that there are ties."""
    scores = [(8 * case.normal(case.rows, case.width)).round().abs(), (8 * case.normal(5, case.width)).round().abs()]
    weights = [torch.sign(case.normal(*s.shape)) for s in scores]
    for per in ("model", "row"):
        found = fastguard.threshold_select(scores, 0.3, weights=weights, per=per)
        counts = [int(0.3 * sum(s.numel() for s in scores))] if per == "model" else [int(0.3 * case.width)] * 2
        exact, _ = select_spec.select([s.cpu() for s in scores], [w.cpu() for w in weights], counts, per)
        for i, (mask, want) in enumerate(zip(found.masks, exact, strict=True)):
            got = fastguard.unpack_mask(mask, want.shape)
            yield Result(f"masks by {per}, tensor {i}", got.double(), want.double().to(case.device), None, 0.0)


def masks(case: Case) -> Iterator[Result]:
    """Packed, unpacked, applied; of a size that is no multiple of eight."""
    n = 8 * case.width + 3
    mask, weight, value = case.integers(2, n).bool(), case.normal(n), case.normal(n)
    packed = fastguard.pack_mask(mask)
    yield Result("packed", packed.double(), masks_spec.pack(mask).double().to(case.device), None, 0.0)
    yield Result("unpacked", fastguard.unpack_mask(packed, (n,)).double(), mask.double(), None, 0.0)
    for name, other in (("zeros", None), ("another's", value)):
        applied = weight.clone()
        fastguard.apply_mask_(applied, packed, other)
        yield Result(f"applied, {name}", applied, masks_spec.apply(weight, mask, other).double(), None, 0.0)


CHECKS: dict[str, Callable[[Case], Iterator[Result]]] = {
    "lm_head_stats": lm_head_stats,
    "lens_stats": lens_stats,
    "linear_cross_entropy": linear_cross_entropy,
    "final_norm": final_norm,
    "head_kl": head_kl,
    "gaussian_mmd": gaussian_mmd,
    "multi_tensor": multi_tensor_ops,
    "representation_distance": representation_distance,
    "project_out": project_out,
    "add_project_rms_norm": add_project_rms_norm,
    "class_moments": class_moments,
    "abs_weight_grad": abs_weight_grad,
    "column_norms": column_norms,
    "gram": gram,
    "threshold_select": threshold_select,
    "masks": masks,
}
"""By the names of ``doctor.OPS``."""


def check(op: str, case: Case) -> str | None:
    """What is wrong with an op in one dtype, by the name of the first output that is; None where all agree."""
    for result in CHECKS[op](case):
        wrong = result.wrong()
        if wrong is not None:
            return f"{result.name}, {str(case.dtype).removeprefix('torch.')}: {wrong}"
    return None

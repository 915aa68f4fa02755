"""multi_tensor on the parameters of SmolLM2-135M (272 tensors, 135 million elements) against torch's own.

Contenders: the ``torch._foreach_*`` calls that compute the same (where one call cannot, the fewest that can; what
they leave out is said beside them), ``torch._fused_adamw_`` and ``torch.optim.AdamW(foreach=True)``. Bytes are those
that cannot be avoided: every list read once, written once. The bandwidth they are compared with is measured in the
same run on one fp32 tensor as large as the model: of ``a.add_(b)`` (read, read, write) or, for what only reads, the
better of a sum and a dot product.
"""

import functools

import pytest
import torch

import measure
from fastguard.ops.multi_tensor import accumulate_, adamw_, copy_, dot, perturb_, reference, squared_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
SHAPES = [(49152, 576), *(LAYER * 30), (576,)]
ADAMW = dict(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def draw(dtype, scale=1.0):
    torch.manual_seed(0)
    return [(torch.randn(s, device=DEVICE) * scale).to(dtype) for s in SHAPES]


@functools.cache
def bandwidth(kind):
    """Measured bytes/s: of an update in place (two reads, one write), or of reading."""
    a, b = (torch.ones(sum(t.numel() for t in draw(torch.float32)), device=DEVICE) for _ in range(2))
    if kind == "read":
        by_sum = a.nbytes / measure.median_seconds(lambda: a.sum(), 7, DEVICE)
        return max(by_sum, 2 * a.nbytes / measure.median_seconds(lambda: a.dot(b), 7, DEVICE))
    return 3 * a.nbytes / measure.median_seconds(lambda: a.add_(b), 7, DEVICE)


def norm_contenders(dtype):
    x = draw(dtype)
    return (
        {
            "fastguard": lambda: squared_norm(x),
            "_foreach_norm": lambda: torch.stack(torch._foreach_norm(x, 2, dtype=torch.float32)).square().sum(),
        },
        sum(t.nbytes for t in x),
        lambda s: float(abs(s.double() / reference.squared_norm(x) - 1)),
    )


def dot_contenders(dtype):
    x, y = draw(dtype), draw(dtype)
    x[0] += y[0]

    def products():
        return torch.stack([p.sum(dtype=torch.float32) for p in torch._foreach_mul(x, y)]).sum()

    exact = functools.cache(lambda: reference.dot(x, y))
    return (
        {
            "fastguard": lambda: dot(x, y),
            "_foreach_mul, sums": products,
        },
        2 * sum(t.nbytes for t in x),
        lambda s: float(abs(s.double() / exact() - 1)),
    )


def accumulate_contenders(dtype):
    total, x = draw(torch.float32), draw(dtype)
    return (
        {
            "fastguard": lambda: accumulate_(total, x, 1e-3),
            "_foreach_add_": lambda: torch._foreach_add_(total, x, alpha=1e-3),
        },
        2 * sum(t.nbytes for t in total) + sum(t.nbytes for t in x),
        None,
    )


def perturb_contenders(dtype):
    """torch's two calls for the step alone; with a copy and four more for what became of it."""
    x, d = draw(dtype), draw(dtype, 1e-3)

    def measured():
        old = [t.clone() for t in x]
        torch._foreach_add_(x, d, alpha=1e-3)
        moved = torch._foreach_sub(x, old)
        norms = [torch.stack(torch._foreach_norm(t, 2, dtype=torch.float32)).square().sum() for t in (d, moved)]
        return *norms, torch.stack([p.sum(dtype=torch.float32) for p in torch._foreach_mul(d, moved)]).sum()

    return (
        {
            "fastguard": lambda: perturb_(x, d, 1e-3),
            "_foreach_add_, not measured": lambda: torch._foreach_add_(x, d, alpha=1e-3),
            "_foreach, measured": measured,
        },
        3 * sum(t.nbytes for t in x),
        None,
    )


def adamw_contenders(dtype):
    p, g = draw(dtype), draw(dtype)
    m, v = draw(dtype), [t.square() for t in draw(dtype)]
    steps = [torch.ones((), device=DEVICE) for _ in p]

    def fused():
        torch._fused_adamw_(p, g, m, v, [], steps, amsgrad=False, maximize=False, **ADAMW)

    def optimizer(**kind):
        params = [torch.nn.Parameter(t) for t in p]
        for parameter, gradient in zip(params, g, strict=True):
            parameter.grad = gradient
        return torch.optim.AdamW(params, lr=1e-5, weight_decay=0.01, **kind).step

    def foreach():  # states of its own, made in the warm-up
        foreach.step = getattr(foreach, "step", None) or optimizer(foreach=True)
        foreach.step()

    return (
        {
            "fastguard": lambda: adamw_(p, g, m, v, 10, **ADAMW),
            "_fused_adamw_": fused,
            "torch.optim.AdamW(foreach=True)": foreach,
        },
        7 * sum(t.nbytes for t in p),
        None,
    )


def mixed_adamw_contenders(_):
    """bf16 parameters and gradients, fp32 moments, which no call of torch has."""
    p, g = draw(torch.bfloat16), draw(torch.bfloat16)
    m, v = draw(torch.float32), [t.square() for t in draw(torch.float32)]
    return {"fastguard": lambda: adamw_(p, g, m, v, 10, **ADAMW)}, 22 * sum(t.numel() for t in p), None


def copy_contenders(dtype):
    x, y = draw(dtype), draw(dtype)
    return (
        {
            "fastguard": lambda: copy_(x, y),
            "_foreach_copy_": lambda: torch._foreach_copy_(x, y),
        },
        2 * sum(t.nbytes for t in x),
        None,
    )


OPS = {
    "squared_norm": (norm_contenders, DTYPES, ["fastguard", "_foreach_norm"]),
    "dot": (dot_contenders, DTYPES, ["fastguard", "_foreach_mul, sums"]),
    "accumulate_ into fp32": (accumulate_contenders, DTYPES, ["fastguard", "_foreach_add_"]),
    "perturb_": (
        perturb_contenders, DTYPES, ["fastguard", "_foreach_add_, not measured", "_foreach, measured"],
    ),
    "adamw_": (
        adamw_contenders, DTYPES, ["fastguard", "_fused_adamw_", "torch.optim.AdamW(foreach=True)"],
    ),
    "adamw_ with fp32 moments": (mixed_adamw_contenders, ["bf16"], ["fastguard"]),
    "copy_": (copy_contenders, DTYPES, ["fastguard", "_foreach_copy_"]),
}  # fmt: skip
CASES = [(op, dtype, name) for op, (_, dtypes, names) in OPS.items() for dtype in dtypes for name in names]

_drawn = {}


def contenders(op, dtype):
    """The contenders of a case share their tensors; those of the last case only are kept."""
    if (op, dtype) not in _drawn:
        _drawn.clear()
        _drawn[op, dtype] = OPS[op][0](DTYPES[dtype])
    return _drawn[op, dtype]


@pytest.mark.parametrize(("op", "dtype", "name"), CASES, ids=lambda x: str(x))
def test_multi_tensor(benchmark, op, dtype, name):
    runs, floor, error = contenders(op, dtype)

    def timed():
        runs[name]()
        measure.synchronize(DEVICE)

    result = runs[name]()
    benchmark.group = f"multi_tensor {op}, SmolLM2 {dtype}"
    benchmark.pedantic(timed, rounds=7, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    rate = bandwidth("read" if op in ("squared_norm", "dot") else "update")
    benchmark.extra_info.update(
        peak_bytes=measure.peak_bytes(runs[name], DEVICE),
        floor_bytes=floor,
        bytes_per_second=floor / seconds,
        fraction_of_bandwidth=floor / seconds / rate,
    )
    if error is not None:
        benchmark.extra_info["relative_error"] = error(result)

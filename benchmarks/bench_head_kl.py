"""head_kl against PyTorch eager and compiled, and on GPUs against Liger's fused linear JSD at beta = 0 (the same KL).

Forward + backward at the student's hidden state and (``trained``) at the head. On a CPU: SmolLM2's own last hidden
states, 256 rows, V 49152, D 576, fp32; on a GPU: 4096 rows of an 8B model's head (V 128256, D 4096) in bf16. The
student is the teacher a little moved. Floor: two products forward (4 N D V flops), one for each gradient (2 N D V);
where no tile of logits is kept, both of the forward's again. The fraction of the GEMM rate counts 6 N D V for a frozen
head and 12 N D V for a trained one, whoever computes less (eager, which keeps all logits) or more.
"""

import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F

import measure
from fastguard.ops.head_kl import head_kl, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENDERS = ("eager", "torch.compile", "liger", "fastguard")


def eager(student, teacher, weight):
    """What the published trainers write: two full logits and F.kl_div."""
    with torch.no_grad():
        q = F.log_softmax((teacher @ weight.T).float(), -1)
    p = F.log_softmax((student @ weight.T).float(), -1)
    return F.kl_div(p, q, reduction="none", log_target=True).sum(-1)


@functools.cache
def compiled():
    return torch.compile(eager)


def liger(student, teacher, weight):
    from liger_kernel.transformers import LigerFusedLinearJSD

    # Mean over rows, times their number; the loss is one scalar, so that rows cannot be weighed.
    return LigerFusedLinearJSD(jsd_beta=0.0)(student, weight, teacher, weight.detach()) * student.shape[0]


@functools.cache
def on_gpu():
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(4096, 4096, generator=g, device=DEVICE)
    return hidden, 0.02 * torch.randn(128256, 4096, generator=g, device=DEVICE)


def workload(request):
    """(student, teacher, weight)."""
    if DEVICE == "cuda":
        teacher, weight = on_gpu()
        dtype = torch.bfloat16
    else:
        hidden, weight, _, _ = request.getfixturevalue("activations")
        teacher, dtype = hidden[-1][:4].reshape(-1, hidden[-1].shape[-1])[::2], torch.float32
    torch.manual_seed(0)
    student = teacher + 0.05 * teacher.std() * torch.randn_like(teacher)
    return tuple(t.to(dtype).contiguous() for t in (student, teacher, weight))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_head_kl(benchmark, request, name, trained):
    if name == "liger" and (DEVICE == "cpu" or importlib.util.find_spec("liger_kernel") is None):
        pytest.skip("liger needs a GPU and liger-kernel")
    student, teacher, weight = workload(request)
    leaves = student.requires_grad_(), weight.requires_grad_(trained)
    wanted = leaves if trained else leaves[:1]
    loss = {"eager": eager, "torch.compile": compiled(), "liger": liger, "fastguard": head_kl}[name]

    def run():
        return torch.autograd.grad(loss(leaves[0], teacher, leaves[1]).sum(), wanted)

    def timed():
        run()
        measure.synchronize(DEVICE)

    few = slice(0, 64)
    exact = student.detach()[few].double().requires_grad_()
    want = torch.autograd.grad(reference.head_kl(exact, teacher[few].double(), weight.detach().double()).sum(), exact)[
        0
    ]
    error = float((run()[0][few].double() - want).norm() / want.norm())
    (n, d), v = student.shape, weight.shape[0]
    head = "trained" if trained else "frozen"
    benchmark.group = f"head_kl forward+backward, {head} head, {n} x {d} x {v}"
    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    rate = measure.gemm_rate(256 if DEVICE == "cpu" else n, d, v, student.dtype, DEVICE)
    fraction = (12 if trained else 6) * n * d * v / seconds / rate
    peak = measure.peak_bytes(run, DEVICE)
    benchmark.extra_info.update(
        peak_bytes=peak, gemm_rate=rate, fraction_of_gemm_rate=fraction, gradient_error=[error]
    )  # fmt: skip
    print(
        f"\n{head:7} {name:14} {1e3 * seconds:8.1f} ms  {fraction:4.0%} of the GEMM rate  "
        f"peak {peak / 1e6:7.1f} MB  error {error:.1e}"
    )

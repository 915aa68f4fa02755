"""The GPU kernels of ``lm_head_stats`` in Triton's interpreter, against the float64 specification.

Run by tests/test_triton.py with TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton in a process of its own. bfloat16
is left to GPUs: the interpreter computes products of bfloat16 operands wrongly.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.lm_head_stats import exact as exact_rows
from fastguard.ops.lm_head_stats import live, lm_head_stats, order, portable, reference
from fastguard.ops.lm_head_stats.op import Grads, Saved
from fastguard.ops.table import Chip
from fastguard.ops.vocabulary import Head

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FASTGUARD_BACKEND") != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 and FASTGUARD_BACKEND=triton", allow_module_level=True)

from fastguard.ops.launch import processors
from fastguard.ops.lm_head_stats import triton as ops
from fastguard.ops.lm_head_stats.triton import backward_pass, configs, forward_pass, scan

pytestmark = pytest.mark.interpreter

NAMES = ("lse", "rest_lse", "target_logit", "mean_logit")
OPTIONS = {"scale": 1.3, "softcap": 15.0}

# (N, V, D) and why
SHAPES = {
    "one row": (1, 200, 40),
    "one token": (3, 1, 16),
    "two tokens": (5, 2, 16),
    "a block with one column": (4, 129, 16),
    "two tiles, parts of unequal size, odd D": (130, 301, 41),
}


def draw(n, v, d, dtype, spread=1.0):
    """Hidden, weight, bias, target; logits of standard deviation ``spread`` from hidden and weight, 0.5 from bias."""
    hidden = (torch.randn(n, d) * spread / d**0.5).to(dtype)
    return hidden, torch.randn(v, d).to(dtype), (0.5 * torch.randn(v)).to(dtype), torch.randint(0, v, (n,))


def gradients(fn, inputs, upstream, which):
    """Values, and gradients of the outputs ``which``, at fresh leaves."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = fn(*leaves)
    grads = torch.autograd.grad(
        [outputs[i] for i in which], leaves, [upstream[i].to(outputs[i].dtype) for i in which], allow_unused=True
    )
    return [o.detach() for o in outputs], [
        torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)
    ]


def all_three(inputs, target, upstream, which, filter_tol=0.0, **options):
    """(values, gradients) of the kernels, of the specification in float64, and of the same dtype in PyTorch."""

    def ours(h, w, *b):
        return lm_head_stats(h, w, target, bias=b[0] if b else None, filter_tol=filter_tol, with_mean=True, **options)

    def spec(h, w, *b):
        return reference.lm_head_stats(h, w, target, b[0] if b else None, **options)

    mine = gradients(ours, inputs, upstream, which)
    exact = gradients(spec, [t.double() for t in inputs], upstream, which)
    return mine, exact, gradients(spec, inputs, upstream, which)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_exact_mode_matches_the_specification(shape, dtype):
    """Bias, scale, softcap, an ignored row, every output, upstream gradients that differ per row."""
    n, v, d = shape
    if dtype != torch.float32 and n < portable.TILE:
        pytest.skip("the dtype changes loads, stores and the size of blocks only")
    *inputs, target = draw(n, v, d, dtype)
    if n > 1:
        target[1] = -100
    upstream = torch.randn(4, n, dtype=torch.float64)
    which = [0, 2, 3] if v == 1 else [0, 1, 2, 3]  # without a rest, rest_lse is -inf by definition
    mine, exact, peer = all_three(inputs, target, upstream, which, **OPTIONS)
    for i in which:
        assert_agrees(NAMES[i], mine[0][i], exact[0][i], peer[0][i])
    for name, got, want, same in zip(("hidden", "weight", "bias"), mine[1], exact[1], peer[1], strict=True):
        assert_agrees(name, got, want, same)
        if v > 2 and n > 1:
            assert_catches_spoiled(lambda g, w=want, s=same, name=name: assert_agrees(name, g, w, s), got)


@pytest.mark.parametrize("which", [c for k in (1, 2) for c in itertools.combinations(range(4), k)], ids=str)
def test_outputs_alone_and_in_pairs(which):
    """Gradients that are not asked for take no part; filtered ones (of one output) are close, per tensor."""
    filter_tol = 0.1 if len(which) == 1 else 0.0
    *inputs, target = draw(9, 300, 16, torch.float32, spread=3.0)
    mine, exact, peer = all_three(inputs[:2], target, torch.randn(4, 9, dtype=torch.float64), which, filter_tol)
    for name, got, want, same in zip(("hidden", "weight"), mine[1], exact[1], peer[1], strict=True):
        assert_agrees(name, got, want, same, ulps=32 if filter_tol == 0 else 0.02 * 2**23)


def record(inputs, target, filter_tol, with_mean=False, **options):
    """(columns of each row's tile [N, V], float64 masses relative to the rest [N, V])."""
    hidden, weight, bias = inputs
    n, v = hidden.shape[0], weight.shape[0]
    columns = torch.zeros(-(-n // portable.TILE), v + 4 * portable.TILE, dtype=torch.uint8)
    head = Head(weight, bias, **options)
    _, rest_lse, _, _ = order.forward(ops, hidden, head, target, filter_tol, with_mean, columns)
    z = reference.logits_of(hidden.double(), replace(head, weight=weight.double(), bias=bias.double()))
    rows = order.by_spread(hidden, head) if len(columns) > 1 else torch.arange(n)
    tile = torch.empty(n, dtype=torch.int64).scatter_(0, rows, torch.arange(n) // portable.TILE)
    return columns[tile, :v], torch.exp(z - rest_lse.double()[:, None]).scatter(1, target[:, None], 0.0)


@pytest.mark.parametrize("sample", [64, 2048], ids=["from a bound", "from nothing"])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "softcap"])
def test_filter_keeps_its_promise(sample, options, monkeypatch):
    """No row drops more than filter_tol of its rest mass, targets live, and codes tell a dropped column's peak."""
    monkeypatch.setattr(forward_pass, "SAMPLE", sample)
    n, v, tol = 130, 550, 0.1
    *inputs, target = draw(n, v, 40, torch.float32, spread=8.0)
    inputs[0][:] = inputs[0][torch.arange(n) % 8] + 0.1 * inputs[0]  # as a batch's rows, alike
    columns, mass = record(inputs, target, tol, **options)
    is_live = columns == live.LIVE
    assert 0.01 < is_live.double().mean() < 0.9, "the case must drop columns"
    assert float((mass * ~is_live).sum(1).max()) <= tol * (1 + 1e-5)
    assert is_live[torch.arange(n), target].all()
    # Running masses are upper bounds of the final ones, so codes may be high but not lower than half a step.
    known = ~is_live & (columns > 1)
    octaves = (columns.double() - 254) / portable.CODES_PER_OCTAVE - torch.log2(mass)
    assert known.any()
    assert float(octaves[known].min()) > -0.25


def test_a_bound_to_start_from_drops_more(monkeypatch):
    """Where hot columns hold the mass, parts of V that start without knowing it keep columns that hold none."""
    *inputs, target = draw(8, 1000, 16, torch.float32, spread=2.0)
    inputs[2][:8] += 12.0
    counts = {}
    for sample in (64, 2048):
        monkeypatch.setattr(forward_pass, "SAMPLE", sample)
        counts[sample] = int((record(inputs, target, 0.1)[0] == live.LIVE).sum())
    assert counts[64] < counts[2048] / 2


def test_the_kernels_follow_the_rule(monkeypatch):
    """Codes and live columns are the specification's, among flat, one-hot, equal and NaN rows; of these none asks."""
    monkeypatch.setattr(forward_pass, "SAMPLE", 64)
    *inputs, target = draw(128, 1100, 40, torch.float32, spread=12.0)
    hidden, weight, bias = inputs
    hidden[:] = hidden[torch.arange(128) % 8] + 0.1 * hidden  # as a batch's rows, alike
    hidden[3] /= 3
    hidden[4] *= 8
    hidden[5] = hidden[6]
    hidden[7] = float("nan")
    head, rows = Head(weight, bias), torch.arange(128) != 7
    columns = torch.zeros(1, 1100, dtype=torch.uint8)
    stats = ops.forward(hidden, head, target, 0.1, False, columns)
    bound = forward_pass._bound(hidden, head, target, stats.target_logit)[rows]
    block = configs.config(torch.float32, hidden.shape[1], Chip("", "", 0)).scan.outer
    parts = scan._parts(1, -(-1100 // (2 * block)), processors(hidden.device))
    assert parts > 1
    z = reference.logits_of(hidden, head)[rows]
    codes = reference.one_pass_codes(z, target[rows], bound, 0.1, parts, block, forward_pass.ROUNDING)
    codes[target[7]] = live.LIVE
    assert 0.01 < (codes == live.LIVE).double().mean() < 0.5
    assert (columns[0] == codes).double().mean() > 0.99  # a code may be rounded the other way
    assert ((columns[0] == live.LIVE) == (codes == live.LIVE)).double().mean() > 0.998
    assert ((columns[0].int() - codes.int()).abs() <= 1)[(columns[0] != live.LIVE) & (codes != live.LIVE)].all()
    assert stats.lse.isnan().tolist() == (~rows).tolist()


def flat_and_peaked(n=130, v=500):
    """Rows of four kinds with few dominant columns each, and one row whose mass lies evenly on all."""
    *inputs, target = draw(n, v, 40, torch.float32, spread=6.0)
    inputs[0][:] = inputs[0][:4].repeat(n // 4 + 1, 1)[:n]
    inputs[0][3] = 0
    inputs[2].zero_()
    return inputs, target


def test_a_tile_over_the_bound_is_done_over_all_columns(monkeypatch):
    """A row that no threshold can serve makes its tile exact; the other tile keeps its filter."""
    monkeypatch.setattr(live, "first_octave", lambda _: live.THRESHOLDS - 8)  # the last is 2^-7
    inputs, target = flat_and_peaked()
    is_live = record(inputs, target, 0.1)[0] == live.LIVE
    assert is_live[3].all()
    others = is_live.all(1)
    assert int(others.sum()) == portable.TILE
    mine, exact, peer = all_three(inputs, target, torch.randn(4, 130, dtype=torch.float64), range(4), 0.1)
    assert_agrees("hidden", mine[1][0][others], exact[1][0][others], peer[1][0][others])


def test_a_flat_row_lowers_its_tiles_threshold():
    """It need not make the tile exact."""
    *inputs, target = draw(8, 1000, 40, torch.float32, spread=12.0)
    inputs[0][3] /= 4
    columns, mass = record((*inputs[:2], torch.zeros(1000)), target, 0.1)
    is_live = columns[0] == live.LIVE
    peak = mass.max(0).values
    assert float(mass[3][peak < 2.0**-5].sum()) > 0.1, "the case must break the bound at a high threshold"
    assert not is_live.all()
    assert float((mass * ~is_live).sum(1).max()) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("index", range(4), ids=NAMES)
def test_filtered_hidden_gradient_is_within_its_bound_row_by_row(index):
    """A row's error is at most |g| times its dropped weight (twice: the tail stands for it) times the longest head row.

    That is beyond the error of fp32 itself; and without the tail the error would be half as large again.
    """
    n, tol, scale = 130, 0.1, 1.3
    *inputs, target = draw(n, 500, 40, torch.float32, spread=2.0)
    inputs[1] += torch.randn(40)  # rows of real heads have a part in common; the tail is made of it
    inputs[2][:8] += 9.0
    upstream = torch.randn(4, n, dtype=torch.float64)
    mine, exact, peer = all_three(inputs, target, upstream, [index], tol, scale=scale)
    columns, mass = record(inputs, target, tol, with_mean=True, scale=scale)
    share = torch.exp(exact[0][1] - exact[0][0])[:, None]
    hidden, weight, bias = (t.double() for t in inputs)
    z = reference.logits_of(hidden, Head(weight, bias, scale))
    gradient = [mass * share, mass, torch.zeros_like(mass), mass * share * (1 + z - exact[0][3][:, None])][index]
    dropped = gradient * (columns != live.LIVE)
    g = scale * upstream[index][:, None]
    longest = inputs[1].double().norm(dim=1).max()
    error = (mine[1][0].double() - exact[1][0]).norm(dim=1)
    rounding = 4 * (peer[1][0].double() - exact[1][0]).norm(dim=1).max()
    assert (error <= 2 * g[:, 0].abs() * dropped.abs().sum(1) * longest + rounding).all()
    if index != 2:
        without_tail = ((g * dropped) @ inputs[1].double()).norm()
        assert float(without_tail) > 20 * float(rounding), "the case must drop mass"
        assert float(error.norm()) < 0.67 * float(without_tail)


@pytest.mark.parametrize("filter_tol", [0.0, 0.1], ids=["all columns", "dense tiles"])
def test_windows_of_columns_add_up(filter_tol, monkeypatch):
    """Where not all dlogits fit their buffer, windows give the same gradients: some tiles need one, others all."""
    monkeypatch.setattr(backward_pass, "WINDOW_ELEMENTS", 0)
    monkeypatch.setattr(backward_pass, "NARROWEST", 128)
    monkeypatch.setitem(exact_rows.BLOCK, "cpu", (0, 128))
    *inputs, target = draw(130, 303, 40, torch.float32)
    inputs[0][:2] *= 40  # the most peaked rows are a tile of their own
    found = (record(inputs, target, 0.1, True)[0] == live.LIVE).sum(1)
    assert found.max() > 256 and found.min() <= 128
    upstream = torch.randn(4, 130, dtype=torch.float64)
    mine, exact, peer = all_three(inputs, target, upstream, range(4), filter_tol)
    for name, got, want, same in zip(("hidden", "weight", "bias"), mine[1], exact[1], peer[1], strict=True):
        assert_agrees(name, got, want, same, ulps=32 if filter_tol == 0 else 0.02 * 2**23)


@pytest.mark.parametrize("filter_tol", [0.0, 0.1])
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_wanted(wanted, filter_tol):
    """Frozen inputs get no gradient and change none."""
    *inputs, target = draw(130, 200, 16, torch.float32, spread=3.0)
    got = []
    for names in ((wanted,), ("hidden", "weight", "bias")):
        leaves = dict(zip(("hidden", "weight", "bias"), (t.clone() for t in inputs), strict=True))
        for name in names:
            leaves[name].requires_grad_()
        stats = lm_head_stats(leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], filter_tol=filter_tol)
        (stats.lse - stats.target_logit).sum().backward()
        assert [k for k, t in leaves.items() if t.grad is not None] == list(names)
        got.append(leaves[wanted].grad)
    assert torch.equal(*got)


@pytest.mark.parametrize("shared", [100 * 1024, 163 * 1024, 227 * 1024])
def test_block_shapes_of_every_device(shared, monkeypatch):
    """The blocks of small, A100-like and Hopper-like devices agree with the specification."""
    for module in (forward_pass, backward_pass):
        monkeypatch.setattr(module, "chip", lambda device: Chip("", "", shared))
    *inputs, target = draw(130, 303, 72, torch.float16, spread=4.0)
    upstream = torch.randn(4, 130, dtype=torch.float64)
    mine, exact, peer = all_three(inputs, target, upstream, range(4), **OPTIONS)
    for name, got, want, same in zip(("hidden", "weight", "bias"), mine[1], exact[1], peer[1], strict=True):
        assert_agrees(name, got, want, same)
    mine, _, _ = all_three(inputs, target, upstream, range(4), 0.1, **OPTIONS)
    for name, got, want, same in zip(("hidden", "weight", "bias"), mine[1], exact[1], peer[1], strict=True):
        assert_agrees(name, got, want, same, ulps=0.05 * 2**11)


@pytest.mark.parametrize("filter_tol", [0.0, 0.1])
def test_buffers_are_added_to(filter_tol):
    """dweight and dbias collect the gradients of several calls."""
    hidden, weight, bias, target = draw(5, 130, 16, torch.float32)
    ones = torch.ones(5)
    head = Head(weight, bias)
    columns = torch.zeros(1 if filter_tol else 0, 130, dtype=torch.uint8)
    stats = ops.forward(hidden, head, target, filter_tol, False, columns)
    saved = Saved(stats.lse, stats.rest_lse, None)

    def run(dweight, dbias):
        given = columns if filter_tol else None
        ops.backward(Grads(ones, None, None, None), hidden, head, target, saved, given, False, dweight, dbias)
        return dweight, dbias

    once = run(torch.zeros(130, 16), torch.zeros(130))
    more = run(torch.ones(130, 16), torch.ones(130))
    for a, b in zip(once, more, strict=True):
        torch.testing.assert_close(b, a + 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("filter_tol", [0.0, 0.01])
def test_float16_keeps_what_light_columns_hold(filter_tol):
    """A flat row's probabilities times a small upstream gradient are below float16's least number."""
    hidden, weight, _, target = draw(5, 301, 24, torch.float16, spread=0.1)
    columns = torch.zeros(1 if filter_tol else 0, 301, dtype=torch.uint8)
    stats = ops.forward(hidden, Head(weight), target, filter_tol, False, columns)
    g, saved = torch.full((5,), 2.0**-17), Saved(stats.lse, stats.rest_lse, None)
    dweight, dbias = torch.zeros(301, 24), torch.zeros(301)
    given = columns if filter_tol else None
    dx = ops.backward(Grads(None, g, None, None), hidden, Head(weight), target, saved, given, True, dweight, dbias)
    z = (hidden.double() @ weight.double().t()).scatter(1, target[:, None], -torch.inf)
    d = z.softmax(1) * 2.0**-17
    for got, want in ((dx, d @ weight.double()), (dweight, d.t() @ hidden.double()), (dbias, d.sum(0))):
        assert (got.double() - want).norm() <= 0.03 * want.norm()


def test_refuses_a_strided_buffer():
    hidden, weight, _, target = draw(2, 8, 16, torch.float32)
    grads, saved = Grads(torch.ones(2), None, None, None), Saved(torch.zeros(2), torch.zeros(2), None)
    columns = torch.full((1, 8), live.LIVE, dtype=torch.uint8)
    with pytest.raises(ValueError, match="dweight"):
        ops.backward(grads, hidden, Head(weight), target, saved, columns, False, torch.zeros(16, 8).t(), None)


def test_float64_is_served_by_the_portable_backend():
    *inputs, target = draw(5, 61, 8, torch.float64)
    mine, exact, _ = all_three(inputs, target, torch.randn(4, 5, dtype=torch.float64), range(4))
    for got, want in zip(mine[1], exact[1], strict=True):
        assert_agrees("gradient", got, want, ulps=256)


def test_no_rows_and_nan():
    *inputs, target = draw(3, 20, 8, torch.float32)
    empty = lm_head_stats(inputs[0][:0], inputs[1], target[:0])
    assert all(s.shape == (0,) for s in empty[:3])
    inputs[0][1] = float("nan")
    stats = lm_head_stats(inputs[0], inputs[1], target, with_mean=True)
    for s in stats:
        assert s.isnan().tolist() == [False, True, False]


def test_results_repeat_bit_for_bit():
    *inputs, target = draw(130, 200, 16, torch.float32, spread=3.0)
    upstream = torch.randn(4, 130)

    def once():
        return gradients(
            lambda h, w, b: lm_head_stats(h, w, target, bias=b, with_mean=True), inputs, upstream, range(4)
        )

    for first, second in zip(itertools.chain(*once()), itertools.chain(*once()), strict=True):
        assert torch.equal(first, second)

"""The head at an 8B model's shapes: forward alone, backward alone by kernel, cross-entropy beside its peers, the lens.

Floors: 2 N D V flops of a forward, 4 N D V of its two gradients, 2 N D V more where logits are not kept; with a filter
6 N D C for the live columns C. Gradient errors are relative to fp32 products, of rows in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastguard
from fastguard import backend
from fastguard.bench import peers, timing, zipf
from fastguard.bench.shapes import Shapes
from fastguard.bench.work import Group, Work
from fastguard.ops.lm_head_stats import order
from fastguard.ops.lm_head_stats.live import LIVE
from fastguard.ops.lm_head_stats.op import DEFAULT_FILTER_TOL, TILE
from fastguard.ops.vocabulary import Head

CHUNK = 1024
"""Rows whose fp32 logits are alive at a time in the reference."""

OURS = {"fastguard": None, "fastguard, exact": 0.0}
"""The filter_tol of each."""

DATA: dict[str, dict[str, Any]] = {
    "": {},
    ", as of last layers": {"exponent": 1.5},
    ", a sink in each tile": {"flat": 1},
}
"""What hidden states are like (``zipf.reading``), for contenders that depend on it: as of inner layers, or else."""


def drawn(shapes: Shapes, vocabulary: int, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and target on the device, the same at each call."""
    generator = torch.Generator(shapes.device).manual_seed(1)
    found = zipf.reading(shapes.rows, shapes.hidden, vocabulary, generator, **how)
    return found.hidden.to(shapes.dtype), found.head.to(shapes.dtype), found.target


def live(h: Tensor, w: Tensor, t: Tensor, **options: Any) -> float:
    """The part of all (tile, column) pairs that the forward finds live; options: the head's scale and soft-cap."""
    record = torch.zeros(-(-len(h) // TILE), len(w) + 4 * TILE, dtype=torch.uint8, device=h.device)
    impl = backend.choose("lm_head_stats", h.device)
    order.forward(impl, h, Head(w, **options), t, DEFAULT_FILTER_TOL[h.dtype], False, record)
    return float((record[:, : len(w)] == LIVE).double().mean())


def entropy(h: Tensor, w: Tensor) -> float:
    """Mean entropy of the first rows' predictions, in nats."""
    log_p = torch.log_softmax((h[:256] @ w.t()).float(), -1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def forward(shapes: Shapes) -> Callable[[str], Work]:
    """Statistics alone; ``recorded`` is what a forward does whose gradient is wanted."""
    flops = 2.0 * shapes.rows * shapes.hidden * shapes.vocabulary

    def make(name: str) -> Work:
        peer, _, data = name.partition(" recorded")
        h, w, t = drawn(shapes, shapes.vocabulary, **DATA[data])
        if peer != "fastguard":
            loss = peers.PEERS[name]()
            return Work(torch.no_grad()(lambda: loss(h, w, t)), flops)
        figures: dict[str, Any] = {}
        if name != "fastguard":
            h.requires_grad_()
            figures = {"live": live(h.detach(), w, t), "entropy": entropy(h.detach(), w)}
        return Work(lambda: fastguard.lm_head_stats(h, w, t), flops, figures=figures)

    return make


def backward(shapes: Shapes) -> Callable[[str], Work]:
    """Both gradients of a loss whose forward has been, and which kernels take the time."""

    def make(name: str) -> Work:
        kind = "fastguard, exact" if name.startswith("fastguard, exact") else "fastguard"
        h, w, t = drawn(shapes, shapes.vocabulary, **DATA[name.removeprefix(kind)])
        part = 1.0 if OURS[kind] == 0.0 else live(h, w, t)
        leaves = h.requires_grad_(), w.requires_grad_()
        loss = fastguard.linear_cross_entropy(*leaves, t, filter_tol=OURS[kind])

        def run() -> object:
            return torch.autograd.grad(loss, leaves, retain_graph=True)

        run()
        flops = 6.0 * shapes.rows * shapes.hidden * shapes.vocabulary * part
        return Work(run, flops, figures={"live": part, "kernels": timing.kernels(run, shapes.device)})

    return make


def exact_gradients(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean cross-entropy, by fp32 products."""
    wide, dw, dh = w.float(), torch.zeros(w.shape, device=w.device), []
    for rows, target in zip(h.float().split(CHUNK), t.split(CHUNK), strict=True):
        dz = torch.softmax(rows @ wide.t(), -1)
        dz[torch.arange(len(rows), device=h.device), target] -= 1
        dz /= len(h)
        dh.append(dz @ wide)
        dw.addmm_(dz.t(), rows)
    return torch.cat(dh), dw


def cross_entropy(vocabulary: Callable[[Shapes], int]) -> Callable[[Shapes], Callable[[str], Work]]:
    """Forward and backward of the mean cross-entropy, with the head's gradient."""

    def prepare(shapes: Shapes) -> Callable[[str], Work]:
        h, w, t = drawn(shapes, vocabulary(shapes))
        exact = exact_gradients(h, w, t)
        leaves = h.requires_grad_(), w.requires_grad_()

        def make(name: str) -> Work:
            if name in OURS:
                loss: peers.Loss = lambda h, w, t: fastguard.linear_cross_entropy(h, w, t, filter_tol=OURS[name])  # noqa: E731
            else:
                loss = peers.PEERS[name]()

            def run() -> tuple[Tensor, ...]:
                return torch.autograd.grad(loss(*leaves, t), leaves)

            errors = [float((got.float() - want).norm() / want.norm()) for got, want in zip(run(), exact, strict=True)]
            return Work(run, 6.0 * h.numel() * len(w), figures={"gradient error": max(errors)})

        return make

    return prepare


def lens(shapes: Shapes) -> Callable[[str], Work]:
    """All hidden states through final norm and head, whose gradient is collected in one buffer: a RepNoise step's."""
    h, w, t = drawn(shapes, shapes.vocabulary)
    rows = torch.arange(shapes.rows, device=shapes.device)
    norm = torch.ones(shapes.hidden, device=shapes.device, dtype=shapes.dtype)
    leaf = h.requires_grad_()

    def make(name: str) -> Work:
        start = torch.zeros((), device=shapes.device).expand(w.shape).requires_grad_()

        def run() -> object:
            token: Tensor | None = start
            total = torch.zeros((), device=shapes.device)
            for _ in range(shapes.states):
                stats, token = fastguard.lens_stats(
                    leaf, rows, w, t, norm_weight=norm, token=token, filter_tol=OURS[name]
                )
                total = total + stats.cross_entropy("mean")
            return torch.autograd.grad(total, (leaf, start))

        return Work(run, shapes.states * 2.0 * w.numel() * shapes.rows)

    return make


RECORDED = tuple(f"fastguard recorded{data}" for data in DATA)
BOTH = tuple(OURS)
HEAD = ("linear_cross_entropy",)

GROUPS = {
    "forward": Group(
        (*RECORDED, "fastguard", "eager", "liger SM90 scaled function"), forward, ("lm_head_stats", "final_norm")
    ),
    "backward": Group((*BOTH, *(f"fastguard{data}" for data in DATA if data)), backward, HEAD),
    "cross-entropy": Group((*BOTH, *peers.PEERS), cross_entropy(lambda shapes: shapes.vocabulary), HEAD),
    "cross-entropy, published V": Group(
        (*BOTH, "liger SM90 function", "liger SM90 scaled function", "quack", "eager"),
        cross_entropy(lambda shapes: shapes.published),
        HEAD,
    ),
    "lens": Group(BOTH, lens, ("lens_stats",)),
}

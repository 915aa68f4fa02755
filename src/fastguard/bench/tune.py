"""Block shapes of the matrix kernels, tried on a device: which of a short list serves best at an 8B model's shapes.

Every candidate is checked first against float64, several processes at a time, whose compilers fill the cores
(``fit``); those that agree are timed in turns with the present row (``tune``). The fastest becomes the GPU's own row of
``ops/configurations.json``, if it is faster than the present one by more than `WORTH`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

import fastguard
from fastguard.bench import head
from fastguard.bench.checks import Case, check
from fastguard.bench.shapes import Shapes
from fastguard.bench.work import Absent, Group, Work
from fastguard.ops import table

FIT, TUNE = "fit", "tune"
PRESENT = "present"
WORTH = 0.01
"""By what part of the present row's time another must be faster: less is noise."""

Run = Callable[[], object]


class Kernel(NamedTuple):
    """A kernel of the table, for one class of calls.

    name: in the table. op: of `CHECKS`, which launches it by calls of the class. shapes: the classes of a call at
    these sizes. work: makes what is timed. names, rows: what the numbers of a row are called, and candidates.
    """

    name: str
    op: str
    shapes: Callable[[Shapes], tuple[str, ...]]
    work: Callable[[Shapes], Run]
    names: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]


def scan(**options: Any) -> Callable[[Shapes], Run]:
    """A forward that records live columns."""

    def work(shapes: Shapes) -> Run:
        h, w, t = head.drawn(shapes, shapes.vocabulary)
        h.requires_grad_()
        return lambda: fastguard.lm_head_stats(h, w, t, **options)

    return work


def gradients(shapes: Shapes) -> Run:
    """A filtered backward of the head."""
    h, w, t = head.drawn(shapes, shapes.vocabulary)
    leaves = h.requires_grad_(), w.requires_grad_()
    loss = fastguard.linear_cross_entropy(*leaves, t, keep_logits_bytes=0)
    return lambda: torch.autograd.grad(loss, leaves, retain_graph=True)


def divergence(shapes: Shapes) -> Run:
    """Forward and backward of a student's divergence."""
    teacher, w, _ = head.drawn(shapes, shapes.vocabulary)
    student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
    w.requires_grad_()
    return lambda: torch.autograd.grad(fastguard.head_kl(student, teacher, w).sum(), (student, w))


def activations(shapes: Shapes, width: int) -> torch.Tensor:
    """Of a batch: [samples, tokens, width]."""
    return torch.randn(shapes.samples, shapes.tokens, width, device=shapes.device).to(shapes.dtype)


def scores(several: bool) -> Callable[[Shapes], Run]:
    """An MLP's projection."""

    def work(shapes: Shapes) -> Run:
        grad, x = activations(shapes, shapes.mlp), activations(shapes, shapes.hidden)
        sums = [torch.zeros(shapes.mlp, shapes.hidden, device=shapes.device) for _ in range(1 + several)]
        return lambda: fastguard.abs_weight_grad_(sums[0], grad, x, squared=sums[1] if several else None)

    return work


def gram(shapes: Shapes) -> Run:
    """Of a layer's inputs."""
    x, matrix = activations(shapes, shapes.hidden), torch.zeros(shapes.hidden, shapes.hidden, device=shapes.device)
    return lambda: fastguard.gram_(matrix, x)


def distances(backward: bool) -> Callable[[Shapes], Run]:
    """The noise term of all layers, or its gradient alone."""

    def work(shapes: Shapes) -> Run:
        x = torch.stack([activations(shapes, shapes.hidden).flatten(1) for _ in range(shapes.states)])
        call = torch.zeros((), dtype=torch.int64, device=shapes.device)
        if not backward:
            return lambda: fastguard.gaussian_mmd(x, call=call)
        total = fastguard.gaussian_mmd(x.requires_grad_(), call=call).sum()
        return lambda: torch.autograd.grad(total, x, retain_graph=True)

    return work


def of_width(*options: str) -> Callable[[Shapes], tuple[str, ...]]:
    """Classes of a call on hidden states."""
    return lambda shapes: table.classes(shapes.dtype, shapes.hidden, *options)


BLOCK = ("outer", "inner", "warps", "stages")
LISTED = ((256, 64, 8, 4), (256, 64, 8, 3), (128, 64, 8, 5), (128, 128, 8, 3), (256, 32, 8, 6))

KERNELS = {
    "lm_head_stats.scan_descriptors": Kernel(
        "lm_head_stats.scan_descriptors", "linear_cross_entropy", of_width(), scan(), BLOCK,
        ((256, 64, 8, 3), (256, 128, 8, 2), (128, 64, 8, 4), (128, 128, 8, 3)),
    ),
    "lm_head_stats.scan": Kernel(
        "lm_head_stats.scan", "linear_cross_entropy", of_width(), scan(), BLOCK,
        ((128, 64, 8, 3), (128, 32, 8, 5), (64, 64, 8, 4), (64, 64, 4, 3)),
    ),
    "lm_head_stats.dlogit": Kernel(
        "lm_head_stats.dlogit", "linear_cross_entropy", of_width(), gradients, BLOCK,
        ((128, 64, 8, 3), (128, 32, 8, 5), (64, 64, 8, 4), (64, 64, 4, 4)),
    ),
    "lm_head_stats.dx": Kernel("lm_head_stats.dx", "linear_cross_entropy", of_width(), gradients, BLOCK, LISTED),
    "lm_head_stats.dweight": Kernel(
        "lm_head_stats.dweight", "linear_cross_entropy", of_width(), gradients, BLOCK, LISTED
    ),
    "lm_head_stats.scan_descriptors, options": Kernel(
        "lm_head_stats.scan_descriptors", "lm_head_stats", of_width("options"), scan(softcap=30.0), BLOCK,
        ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 8, 4)),
    ),
    "abs_weight_grad": Kernel(
        "abs_weight_grad", "abs_weight_grad", of_width(), scores(several=False),
        ("outputs", "inputs", "tokens", "warps", "stages"),
        ((128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 64, 64, 8, 4), (128, 128, 64, 4, 3)),
    ),
    "abs_weight_grad, several sums": Kernel(
        "abs_weight_grad", "abs_weight_grad", of_width("several sums"), scores(several=True),
        ("outputs", "inputs", "tokens", "warps", "stages"),
        ((128, 64, 64, 8, 4), (128, 64, 32, 8, 4), (64, 64, 64, 4, 4)),
    ),
    "gaussian_mmd.gradient": Kernel(
        "gaussian_mmd.gradient", "gaussian_mmd", lambda shapes: ("all",), distances(backward=True),
        ("counters", "warps"), ((64, 2), (64, 4), (128, 2), (256, 8)),
    ),
    "gaussian_mmd.gram": Kernel(
        "gaussian_mmd.gram", "gaussian_mmd", lambda shapes: ("part of a tile",), distances(backward=False),
        ("counters", "warps"), ((32, 1), (32, 4), (64, 2), (64, 4)),
    ),
    "head_kl": Kernel(
        "head_kl", "head_kl", of_width(), divergence, ("rows", "columns", "inner", "warps", "stages"),
        ((128, 64, 64, 8, 2), (64, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 64, 32, 8, 4)),
    ),
    "gram": Kernel(
        "gram", "gram", of_width(), gram, ("features", "rows", "warps", "stages"),
        ((128, 64, 8, 3), (128, 32, 8, 5), (128, 128, 8, 2)),
    ),
}  # fmt: skip
"""In the order of their worth."""


def labelled(kernel: Kernel, shapes: Shapes) -> dict[str, table.Row]:
    """Candidates by what they are called; a rehearsal tries one."""
    rows = [dict(zip(kernel.names, row, strict=True)) for row in kernel.rows[: 1 if shapes.device == "cpu" else None]]
    return {", ".join(f"{name} {number}" for name, number in row.items()): row for row in rows}


@contextlib.contextmanager
def trial(kernel: Kernel, shapes: Shapes, label: str) -> Iterator[table.Forced]:
    """Launches take the candidate of this label. Raises `Absent` where this device takes none, or takes it anyway."""
    from fastguard.ops.launch import chip

    own = table.row_of(kernel.name, kernel.shapes(shapes), chip(torch.device(shapes.device)))
    if own is None:
        raise Absent("the table has no row that fits this device")
    row = own if label == PRESENT else labelled(kernel, shapes)[label]
    if row == own and label != PRESENT:
        raise Absent("it is the present one")
    with table.forced(kernel.name, kernel.shapes(shapes)[-1], row) as candidate:
        yield candidate


def fit(shapes: Shapes) -> Callable[[str], Work]:
    """A candidate agrees with float64 or raises: ArithmeticError, or what the compiler has to say."""

    def make(name: str) -> Work:
        key, label = name.split(": ")
        size = shapes.check_rows, shapes.hidden, shapes.check_vocabulary
        with trial(KERNELS[key], shapes, label) as candidate:
            wrong = check(KERNELS[key].op, Case(shapes.device, shapes.dtype, *size, seed=1))
        if not candidate.used:
            raise Absent("no launch on this device asks for it")
        if wrong is not None:
            raise ArithmeticError(wrong)
        return Work(None)

    return make


def tune(key: str) -> Callable[[Shapes], Callable[[str], Work]]:
    """Candidates of one kernel, timed."""
    kernel = KERNELS[key]

    def prepare(shapes: Shapes) -> Callable[[str], Work]:
        run = kernel.work(shapes)

        def make(label: str) -> Work:
            def tried() -> object:
                with trial(kernel, shapes, label):
                    return run()

            with trial(kernel, shapes, label) as candidate:
                run()
            if not candidate.used:  # times would be those of something else
                raise Absent("no launch of what is timed asks for it")
            figures = {"kernel": kernel.name, "class": kernel.shapes(shapes)[0], "row": dict(candidate.row)}
            return Work(tried, figures=figures)

        return make

    return prepare


def groups(shapes: Shapes) -> dict[str, Group]:
    """First of all candidates, dealt out to processes, whether they fit; then a kernel after the other."""
    labels = {key: (PRESENT, *labelled(kernel, shapes)) for key, kernel in KERNELS.items()}
    everyone = tuple(f"{key}: {label}" for key in KERNELS for label in labels[key])
    fits = {f"{FIT} {i + 1}": Group(everyone[i :: shapes.jobs], fit) for i in range(shapes.jobs)}
    return {**fits, **{f"{TUNE} {key}": Group(labels[key], tune(key)) for key in KERNELS}}


Last = Mapping[tuple[str, str], Mapping[str, Any]]


def unfit(last: Last) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Group and name of each candidate that is not to be timed, and the journal's line on why."""
    for (group, name), line in last.items():
        if group.startswith(FIT) and line["state"] != "done":
            key, label = name.split(": ")
            yield f"{TUNE} {key}", label, line


def best(last: Last) -> list[Mapping[str, Any]]:
    """Of each kernel that was timed what the fastest candidate is: kernel, class, row."""
    found = []
    for key in KERNELS:
        timed = {c: line for (g, c), line in last.items() if g == f"{TUNE} {key}" and line["state"] == "timed"}
        if timed:
            took = {c: line["seconds"]["median"] * (1 - WORTH if c == PRESENT else 1) for c, line in timed.items()}
            found.append(timed[min(took, key=lambda c: took[c])]["figures"])
    return found


def updated(rows: table.Table, chip: str, found: list[Mapping[str, Any]]) -> table.Table:
    """A table with what was found as the rows of a chip."""
    out = {kernel: {shape: dict(chips) for shape, chips in shapes.items()} for kernel, shapes in rows.items()}
    for each in found:
        out.setdefault(each["kernel"], {}).setdefault(each["class"], {})[chip] = each["row"]
    return out

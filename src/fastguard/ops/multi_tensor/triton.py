# mypy: disallow-untyped-defs=False
"""``multi_tensor`` on GPUs: one launch over all tensors, which it finds through a table of their addresses.

The table lies on the device: for each tensor its address in every list and its size, and for each chunk of CHUNK
elements the tensor it belongs to and its number there. A program works on one chunk. Sizes rarely change and addresses
repeat from step to step, so that both parts are kept for the lists seen last; a new address costs a copy of a few
kilobytes, without waiting. Tensors whose dtypes or alignment differ from the others' are a launch of their own;
float64 is served by the portable backend, ``copy_`` by torch, which has one launch for it too.

Sums are kept per chunk and added in a fixed order. Whether a launch from CUDA C++ would be faster is not yet measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton
from fastguard.ops.multi_tensor import portable
from fastguard.ops.multi_tensor.portable import copy_, wide_of
from fastguard.ops.multi_tensor.scalars import AdamW

__all__ = ["accumulate_", "adamw_", "copy_", "dot", "perturb_", "squared_norm"]

CHUNK = 8192
"""Elements of a program."""

BLOCK = 1024
"""Elements in flight at a time: eight a thread, one load of 128 bits in bf16 and two in fp32."""

WARPS = 4

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def find(p_sizes, p_tensor, p_number, CHUNK: tl.constexpr):
    """This program's tensor, the first element of its chunk, and how many elements the chunk has."""
    i_tensor = tl.load(p_tensor + tl.program_id(0))
    first = tl.load(p_number + tl.program_id(0)).to(tl.int64) * CHUNK
    return i_tensor, first, tl.minimum(tl.load(p_sizes + i_tensor) - first, CHUNK).to(tl.int32)


@triton.jit
def address(p_table, row: tl.constexpr, n_tensors, i_tensor, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element ``first`` of tensor ``i_tensor`` of list ``row``."""
    p = tl.load(p_table + row * n_tensors + i_tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + first


@triton.jit
def load(p, o, n, MASKED: tl.constexpr):
    """A block in fp32; zero from element n on."""
    if MASKED:
        return tl.load(p + o, mask=o < n, other=0.0).to(tl.float32)
    else:
        return tl.load(p + o).to(tl.float32)


@triton.jit
def store(p, o, n, b_x, MASKED: tl.constexpr):
    """Write a block, rounded to the pointer's type."""
    b_x = b_x.to(p.dtype.element_ty)
    if MASKED:
        tl.store(p + o, b_x, mask=o < n)
    else:
        tl.store(p + o, b_x)


@triton.jit
def seen(b_x, TYPE: tl.constexpr):
    """Values as a dtype has them, in fp32."""
    return b_x.to(TYPE).to(tl.float32)


@triton.jit
def products(p_a, p_b, o, n, SQUARE: tl.constexpr, MASKED: tl.constexpr):
    """a * b; a * a without reading b."""
    b_a = load(p_a, o, n, MASKED)
    b_b = b_a
    if not SQUARE:
        b_b = load(p_b, o, n, MASKED)
    return b_a * b_b


@triton.jit
def dot_kernel(
    p_table, p_sizes, p_tensor, p_number, n_tensors, p_partial,
    SQUARE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [chunks] = sum of a * b."""
    i_tensor, first, n = find(p_sizes, p_tensor, p_number, CHUNK)
    p_a = address(p_table, 0, n_tensors, i_tensor, first, A, ALIGNED)
    p_b = p_a
    if not SQUARE:
        p_b = address(p_table, 1, n_tensors, i_tensor, first, B, ALIGNED)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b_sum += products(p_a, p_b, start + tl.arange(0, BLOCK), n, SQUARE, False)
    if whole < n:
        b_sum += products(p_a, p_b, whole + tl.arange(0, BLOCK), n, SQUARE, True)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_sum, 0))


@triton.jit
def accumulate_block(p_a, p_t, weight, o, n, MASKED: tl.constexpr):
    """a += weight * t."""
    store(p_a, o, n, load(p_a, o, n, MASKED) + weight * load(p_t, o, n, MASKED), MASKED)


@triton.jit
def accumulate_kernel(
    p_table, p_sizes, p_tensor, p_number, n_tensors, weight, p_weight,
    A: tl.constexpr, B: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a += weight * t; the weight is read from p_weight if there is one."""
    i_tensor, first, n = find(p_sizes, p_tensor, p_number, CHUNK)
    p_a = address(p_table, 0, n_tensors, i_tensor, first, A, ALIGNED)
    p_t = address(p_table, 1, n_tensors, i_tensor, first, B, ALIGNED)
    if p_weight is not None:
        weight = tl.load(p_weight).to(tl.float32)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        accumulate_block(p_a, p_t, weight, start + tl.arange(0, BLOCK), n, False)
    if whole < n:
        accumulate_block(p_a, p_t, weight, whole + tl.arange(0, BLOCK), n, True)


@triton.jit
def perturb_block(
    p_t, p_d, p_s, scale, o, n, b_intended, b_realised, b_both,
    THROUGH: tl.constexpr, SOURCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """t = s + scale * d; the sums of products of the intended and the realised step, updated."""
    b_old = load(p_t, o, n, MASKED)
    b_base = b_old
    if SOURCE:
        b_base = load(p_s, o, n, MASKED)
    b_step = scale * load(p_d, o, n, MASKED)
    b_new = seen(b_base + b_step, p_t.dtype.element_ty)
    store(p_t, o, n, b_new, MASKED)
    b_moved = seen(b_new, THROUGH) - seen(b_old, THROUGH)
    return b_intended + b_step * b_step, b_realised + b_moved * b_moved, b_both + b_step * b_moved


@triton.jit
def perturb_kernel(
    p_table, p_sizes, p_tensor, p_number, n_tensors, scale, p_scale, p_partial, n_chunks,
    THROUGH: tl.constexpr, SOURCE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t = s + scale * d, and partial [3, n_chunks]; s is t without SOURCE."""
    i_tensor, first, n = find(p_sizes, p_tensor, p_number, CHUNK)
    p_t = address(p_table, 0, n_tensors, i_tensor, first, A, ALIGNED)
    p_d = address(p_table, 1, n_tensors, i_tensor, first, B, ALIGNED)
    p_s = p_t
    if SOURCE:
        p_s = address(p_table, 2, n_tensors, i_tensor, first, C, ALIGNED)
    if p_scale is not None:
        scale = tl.load(p_scale).to(tl.float32)
    b_0 = tl.zeros([BLOCK], dtype=tl.float32)
    b_1 = tl.zeros([BLOCK], dtype=tl.float32)
    b_2 = tl.zeros([BLOCK], dtype=tl.float32)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_0, b_1, b_2 = perturb_block(p_t, p_d, p_s, scale, o, n, b_0, b_1, b_2, THROUGH, SOURCE, False)
    if whole < n:
        o = whole + tl.arange(0, BLOCK)
        b_0, b_1, b_2 = perturb_block(p_t, p_d, p_s, scale, o, n, b_0, b_1, b_2, THROUGH, SOURCE, True)
    p_out = p_partial + tl.program_id(0)
    tl.store(p_out, tl.sum(b_0, 0))
    tl.store(p_out + n_chunks, tl.sum(b_1, 0))
    tl.store(p_out + 2 * n_chunks, tl.sum(b_2, 0))


@triton.jit
def adamw_block(
    p_p, p_g, p_m, p_v, o, n, decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step; see ``scalars.AdamW``. Roots and quotients are rounded correctly: arithmetic hides behind memory."""
    b_g = load(p_g, o, n, MASKED)
    b_m = load(p_m, o, n, MASKED)
    b_m += mean_weight * (b_g - b_m)
    b_v = square_keep * load(p_v, o, n, MASKED) + square_weight * b_g * b_g
    b_root = tl.div_rn(tl.sqrt_rn(b_v), root_correction) + eps
    b_p = decay * load(p_p, o, n, MASKED) - step_size * tl.div_rn(b_m, b_root)
    store(p_p, o, n, b_p, MASKED)
    store(p_m, o, n, b_m, MASKED)
    store(p_v, o, n, b_v, MASKED)


@triton.jit
def adamw_kernel(
    p_table, p_sizes, p_tensor, p_number, n_tensors,
    decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parameters, gradients and both moments are lists 0 to 3."""
    i_tensor, first, n = find(p_sizes, p_tensor, p_number, CHUNK)
    p_p = address(p_table, 0, n_tensors, i_tensor, first, A, ALIGNED)
    p_g = address(p_table, 1, n_tensors, i_tensor, first, B, ALIGNED)
    p_m = address(p_table, 2, n_tensors, i_tensor, first, C, ALIGNED)
    p_v = address(p_table, 3, n_tensors, i_tensor, first, D, ALIGNED)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        o = start + tl.arange(0, BLOCK)
        adamw_block(
            p_p, p_g, p_m, p_v, o, n, decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps,
            False,
        )  # fmt: skip
    if whole < n:
        o = whole + tl.arange(0, BLOCK)
        adamw_block(
            p_p, p_g, p_m, p_v, o, n, decay, mean_weight, square_keep, square_weight, step_size, root_correction, eps,
            True,
        )  # fmt: skip


class Chunks(NamedTuple):
    """The part of the table that depends on sizes alone."""

    sizes: Tensor  # [tensors], int64
    tensor: Tensor  # [chunks], int32: the tensor that a chunk belongs to
    number: Tensor  # [chunks], int32: its number in the tensor


_captured: list[Tensor] = []
"""What the copies in CUDA graphs read, whenever one is replayed: kept for as long as the process."""


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values.to(device)
    if _capturing(device):  # no pinned memory may be asked for; the graph's copy is asynchronous all the same
        _captured.append(values)
    else:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _chunks(sizes: tuple[int, ...], device: torch.device, _stream: int) -> Chunks:
    counts = [-(-size // CHUNK) for size in sizes]
    count = torch.tensor(counts)
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), count, output_size=sum(counts))
    number = torch.arange(sum(counts)) - (count.cumsum(0) - count).index_select(0, tensor)
    return Chunks(*(_upload(t, device) for t in (torch.tensor(sizes), tensor.int(), number.int())))


def _addresses(addresses: tuple[tuple[int, ...], ...], device: torch.device, _stream: int) -> Tensor:
    """[lists, tensors], int64."""
    return _upload(torch.tensor(addresses, dtype=torch.int64), device)


_kept_chunks = functools.lru_cache(maxsize=16)(_chunks)
_kept_addresses = functools.lru_cache(maxsize=64)(_addresses)


def _stream(device: torch.device) -> int:
    """What a kept table was uploaded on: on another stream it may not have arrived."""
    return torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0


class Group(NamedTuple):
    """Tensors that one launch serves: lists of tensors, and the table of where they are."""

    lists: tuple[tuple[Tensor, ...], ...]
    table: tuple[Tensor, Tensor, Tensor, Tensor, int]  # the first arguments of every kernel
    options: dict[str, Any]

    @property
    def chunks(self) -> int:
        """Programs of the launch."""
        return self.table[2].numel()


def _groups(*lists: Sequence[Tensor]) -> tuple[list[Group], list[tuple[Tensor, ...]]]:
    """The launches, and the lists of what is left to the portable backend."""
    alike: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = {}
    wide: list[tuple[Tensor, ...]] = []
    for tensors in zip(*lists, strict=True):
        dtypes = tuple(t.dtype for t in tensors)
        if torch.float64 in dtypes:
            wide.append(tensors)
        elif tensors[0].numel():
            alike.setdefault((dtypes, all(t.data_ptr() % 16 == 0 for t in tensors)), []).append(tensors)
    groups = [_group(dtypes, aligned, members) for (dtypes, aligned), members in alike.items()]
    return groups, list(zip(*wide, strict=True))


def _group(dtypes: tuple[torch.dtype, ...], aligned: bool, members: list[tuple[Tensor, ...]]) -> Group:
    device = members[0][0].device
    lists = tuple(zip(*members, strict=True))
    # A table that a graph uploads holds nothing before its first replay: it is the graph's own.
    own = _capturing(device)
    chunks_of, addresses_of = (_chunks, _addresses) if own else (_kept_chunks, _kept_addresses)
    chunks = chunks_of(tuple(t.numel() for t in lists[0]), device, _stream(device))
    addresses = addresses_of(tuple(tuple(t.data_ptr() for t in given) for given in lists), device, _stream(device))
    types = {name: TYPES[dtype] for name, dtype in zip("ABCD", dtypes, strict=False)}
    options = {**types, "ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": WARPS}
    return Group(lists, (addresses, *chunks, len(members)), options)


def _scalar(value: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (value, None)


def _sum(partials: list[Tensor], like: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Add up tensors [*shape, chunks], in float64 and in order."""
    wide = wide_of(*like)
    total = torch.zeros(shape, dtype=torch.float64, device=like[0].device if like else None)
    for partial in partials:
        total = total + partial.sum(-1, dtype=torch.float64)
    return total.to(wide)


def _launch(group: Group, kernel: Any, *arguments: Any, **options: Any) -> None:
    with torch.cuda.device_of(group.lists[0][0]):
        kernel[(group.chunks,)](*group.table, *arguments, **{**group.options, **options})


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """See ``portable.squared_norm``."""
    groups, rest = _groups(tensors)
    partials = [_dot(group, square=True) for group in groups]
    return _sum(partials + ([portable.squared_norm(*rest)[None]] if rest else []), tensors, ())


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """See ``portable.dot``."""
    groups, rest = _groups(a, b)
    partials = [_dot(group, square=False) for group in groups]
    return _sum(partials + ([portable.dot(*rest)[None]] if rest else []), [*a, *b], ())


def _dot(group: Group, square: bool) -> Tensor:
    partial = torch.empty(group.chunks, dtype=torch.float32, device=group.lists[0][0].device)
    types = {"B": group.options["A"]} if square else {}
    _launch(group, dot_kernel, partial, SQUARE=square, **types)
    return partial


def accumulate_(accumulators: Sequence[Tensor], tensors: Sequence[Tensor], weight: float | Tensor) -> None:
    """See ``portable.accumulate_``."""
    groups, rest = _groups(accumulators, tensors)
    for group in groups:
        _launch(group, accumulate_kernel, *_scalar(weight))
    if rest:
        portable.accumulate_(rest[0], rest[1], weight)


def perturb_(
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor],
    scale: float | Tensor,
    source: Sequence[Tensor] | None,
    through: torch.dtype | None,
) -> Tensor:
    """See ``portable.perturb_``."""
    lists = (tensors, directions) if source is None else (tensors, directions, source)
    groups, rest = _groups(*lists)
    partials = []
    for group in groups:
        partial = torch.empty(3, group.chunks, dtype=torch.float32, device=tensors[0].device)
        own = group.options["A"]
        types = {"THROUGH": TYPES.get(through, tl.float32) if through else own, "SOURCE": source is not None}
        if source is None:
            types["C"] = own
        _launch(group, perturb_kernel, *_scalar(scale), partial, group.chunks, **types)
        partials.append(partial)
    if rest:
        base = rest[2] if source is not None else None
        partials.append(portable.perturb_(rest[0], rest[1], scale, base, through)[:, None])
    return _sum(partials, [t for given in lists for t in given], (3,))


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: AdamW,
) -> None:
    """See ``portable.adamw_``."""
    groups, rest = _groups(params, grads, exp_avgs, exp_avg_sqs)
    for group in groups:
        _launch(group, adamw_kernel, *scalars)
    if rest:
        portable.adamw_(rest[0], rest[1], rest[2], rest[3], scalars)

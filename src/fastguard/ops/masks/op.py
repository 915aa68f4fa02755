"""Masks of one bit an entry, and what they are applied to.

A packed mask of a tensor with n entries is uint8 [ceil(n / 8)]: entry i of the flat tensor is bit i % 8 of byte i // 8,
the lowest bit first, as ``numpy.packbits(..., bitorder="little")`` has it. The bits behind the last entry are 0.

Checks, schemas and fakes live here, once; the backend modules beside this file share the signatures of
``portable.py``. None records a gradient.

Cost: a mask is read or written once, n / 8 bytes. ``apply_mask_`` touches the entries whose bits are set, in whole
cache lines, and no others: at most the weight read and written, and the value read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard import backend
from fastguard.ops import transforms
from fastguard.ops.precision import DTYPES

FLOATS = (*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
"""What a mask is applied to; zero has no bit set in any of them."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def pack_mask(mask: Tensor) -> Tensor:
    """Eight entries of a boolean mask in a byte.

    Args:
        mask: bool, any shape with n entries.

    Returns:
        [ceil(n / 8)] uint8, entry i of the flat mask in bit i % 8 of byte i // 8, the lowest bit first.

    Raises:
        ValueError: a mask that is not a plain boolean tensor.
    """
    transforms.check_plain(mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    return _pack._opoverload(mask)  # type: ignore[no-any-return]


@torch.no_grad()
def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean mask that ``pack_mask`` packed.

    Args:
        packed: [ceil(n / 8)] uint8. shape: of n entries.

    Returns:
        bool, of that shape.

    Raises:
        ValueError: a packed mask that is not uint8 or not that of n entries.
    """
    transforms.check_plain(packed=packed)
    _check_packed("packed", packed, math.prod(shape))
    return _unpack._opoverload(packed, list(shape))  # type: ignore[no-any-return]


@torch.no_grad()
def apply_mask_(weight: Tensor, mask: Tensor, value: Tensor | None = None) -> None:
    """Set the entries whose bit is set to 0, or to those of another tensor, in place.

    Pruning; with ``value``, the base model's weight, recovery from it; on a gradient, freezing.

    Args:
        weight: floating, n entries, any strides that give each entry memory of its own; written.
        mask: [ceil(n / 8)] uint8, as ``pack_mask`` packs it.
        value: of the shape of weight and any floating dtype, rounded to that of weight; where the dtypes are the same,
            entries are copied bit for bit. None: 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a DTensor, a weight whose entries share memory.
    """
    transforms.check_plain(weight=weight, mask=mask, value=value)
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight: expected a dtype of {', '.join(map(str, FLOATS))}, got {weight.dtype}")
    if any(n > 1 and step == 0 for n, step in zip(weight.shape, weight.stride(), strict=True)):
        raise ValueError(f"weight: expected memory of its own for each element, got strides {weight.stride()}")
    _check_packed("mask", mask, weight.numel())
    if value is not None:
        if value.shape != weight.shape or not value.is_floating_point():
            raise ValueError(
                f"value: expected floats {tuple(weight.shape)} as weight, got {value.dtype} {tuple(value.shape)}"
            )
        value = value.to(weight.dtype)
    for name, tensor in (("mask", mask), ("value", value)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: expected device {weight.device}, got {tensor.device}")
    _apply._opoverload(weight, mask, value)


@torch.no_grad()
def and_not(a: Tensor, b: Tensor) -> Tensor:
    """What is set in the packed mask a and not in b: the set difference (Wei et al. 2024, arXiv 2402.05162).

    Args:
        a, b: packed masks, uint8, of one shape.

    Raises:
        ValueError: not uint8, or shapes or devices that differ.
    """
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.uint8 or tensor.shape != a.shape or tensor.device != a.device:
            raise ValueError(
                f"{name}: expected uint8 {tuple(a.shape)} on {a.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    return a & ~b


@torch.no_grad()
def count_bits(packed: Tensor) -> Tensor:
    """How many entries of a packed mask are set: 0-dim int64.

    Args:
        packed: uint8, any shape.

    Raises:
        ValueError: not a plain uint8 tensor.
    """
    transforms.check_plain(packed=packed)
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed: expected torch.uint8, got {packed.dtype}")
    return _count._opoverload(packed)  # type: ignore[no-any-return]


def _check_packed(name: str, packed: Tensor, n: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape != ((n + 7) // 8,):
        raise ValueError(
            f"{name}: expected uint8 [{(n + 7) // 8}], a packed mask of {n} entries, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )


@torch.library.custom_op("fastguard::pack_mask", mutates_args=())
def _pack(mask: Tensor) -> Tensor:
    return backend.choose("masks", mask.device).pack(mask.contiguous().view(-1))  # type: ignore[no-any-return]


@_pack.register_fake
def _(mask):  # type: ignore[no-untyped-def]
    return mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op("fastguard::unpack_mask", mutates_args=())
def _unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    mask: Tensor = backend.choose("masks", packed.device).unpack(packed.contiguous(), math.prod(shape))
    return mask.view(list(shape))


@_unpack.register_fake
def _(packed, shape):  # type: ignore[no-untyped-def]
    return packed.new_empty(shape, dtype=torch.bool)


@torch.library.custom_op("fastguard::apply_mask_", mutates_args=("weight",))
def _apply(weight: Tensor, mask: Tensor, value: Tensor | None) -> None:
    dense = weight.detach().contiguous()
    integer = _INTEGERS[weight.element_size()]
    given = None if value is None else value.detach().contiguous().view(integer).view(-1)
    impl = backend.choose("masks", weight.device)
    impl.apply_(dense.view(integer).view(-1), mask.contiguous(), given)
    if not weight.is_contiguous():
        weight.copy_(dense)


@_apply.register_fake
def _(weight, mask, value):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("fastguard::count_bits", mutates_args=())
def _count(packed: Tensor) -> Tensor:
    return backend.choose("masks", packed.device).count(packed.contiguous().view(-1))  # type: ignore[no-any-return]


@_count.register_fake
def _(packed):  # type: ignore[no-untyped-def]
    return packed.new_empty((), dtype=torch.int64)

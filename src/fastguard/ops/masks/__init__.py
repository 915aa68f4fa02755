"""Masks of one bit an entry: packed, unpacked, combined, applied to weights and gradients in place."""

from fastguard.ops.masks.op import and_not, apply_mask_, count_bits, pack_mask, unpack_mask

__all__ = ["and_not", "apply_mask_", "count_bits", "pack_mask", "unpack_mask"]

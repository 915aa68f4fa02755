"""Packed masks on CPU: torch's own calls."""

from fastguard.ops.masks.portable import apply_, count, pack, unpack

__all__ = ["apply_", "count", "pack", "unpack"]

"""``threshold_select`` on CPU: torch's own calls."""

from fastguard.ops.threshold_select.portable import BITS, histogram, rows, ties, write

__all__ = ["BITS", "histogram", "rows", "ties", "write"]

"""``final_norm`` on CPU: by torch; the product with the head that follows takes some thousand times as long."""

from __future__ import annotations

from fastguard.ops.final_norm.portable import backward, forward

__all__ = ["backward", "forward"]

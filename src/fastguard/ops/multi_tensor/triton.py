"""``multi_tensor`` on GPU."""

from fastguard.ops.multi_tensor.portable import accumulate_, adamw_, copy_, dot, perturb_, squared_norm

__all__ = ["accumulate_", "adamw_", "copy_", "dot", "perturb_", "squared_norm"]

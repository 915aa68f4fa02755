"""One pass over all of a model's parameters: norm, dot product, accumulation, perturbation, AdamW, copy."""

from fastguard.ops.multi_tensor.op import accumulate_, adamw_, copy_, dot, perturb_, squared_norm

__all__ = ["accumulate_", "adamw_", "copy_", "dot", "perturb_", "squared_norm"]

"""Directions in a model's residual stream: how they are made orthonormal."""

from fastguard.directions.basis import orthonormalise

__all__ = ["orthonormalise"]

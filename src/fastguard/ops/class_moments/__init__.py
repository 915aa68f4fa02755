"""Running means of activations by class and position, to the precision of a pair of numbers."""

from fastguard.ops.class_moments.op import class_moments_

__all__ = ["class_moments_"]

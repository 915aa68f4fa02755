"""How far each row of a stack of hidden states is from a reference's, and its gradient, without differences."""

from fastguard.ops.representation_distance.op import representation_distance

__all__ = ["representation_distance"]

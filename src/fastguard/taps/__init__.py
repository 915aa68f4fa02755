"""Taps: statistics taken where activations arise, and kept in their place.

``structure``  finds the head, the final norm, the layers, their MLPs and attentions by a probe, not by names
``taps``       permanent hooks with an on/off flag, bound to the forward that they serve
``anchor``     the gradient of a parameter that many taps share, sharded parameters included
``lens``       a hidden state read through the final norm and the head
"""

from fastguard.taps.lens import Lens
from fastguard.taps.structure import Structure, find_structure, tap_hidden_states
from fastguard.taps.taps import Gate, Scope, Taps

__all__ = ["Gate", "Lens", "Scope", "Structure", "Taps", "find_structure", "tap_hidden_states"]

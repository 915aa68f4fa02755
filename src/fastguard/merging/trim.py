"""The largest numbers of a tensor by magnitude, exactly, without sorting it or holding it: digit by digit.

Magnitudes are ordered as their bits are. One pass over the numbers counts their upper sixteen bits; the next, of those
that begin like the k-th largest, the sixteen bits that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DIGIT = 16
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Largest:
    """The ``count`` largest magnitudes of what ``portions`` gives, float32 or float64; of equal ones the first.

    Args:
        portions: gives the numbers anew, as often as it is called, in the order in which `among` is then asked.
        dtype: theirs.
        count: how many, at most as many as there are.
    """

    def __init__(self, portions: Callable[[], Iterable[Tensor]], dtype: torch.dtype, count: int) -> None:
        self._kind = INTEGERS[dtype]
        self._least, self._equal = torch.iinfo(self._kind).max, 0
        if count:
            self._find(portions, count)

    def _find(self, portions: Callable[[], Iterable[Tensor]], count: int) -> None:
        found, width = 0, 8 * self._kind.itemsize
        for shift in range(width - DIGIT, -1, -DIGIT):
            counts = torch.zeros(2**DIGIT, dtype=torch.int64)
            for portion in portions():
                bits = self._bits(portion)
                if shift < width - DIGIT:
                    bits = bits[bits >> shift + DIGIT == found]
                counts += torch.bincount(bits >> shift & 2**DIGIT - 1, minlength=2**DIGIT)
            # as many as are at least the digit; the k-th largest has the last digit that k of them reach
            reached = counts.flip(0).cumsum(0).flip(0)
            digit = int((reached >= count).sum()) - 1
            count -= int(reached[digit] - counts[digit])
            found = found << DIGIT | digit
        self._least, self._equal = found, count

    def among(self, portion: Tensor) -> Tensor:
        """Which of these, the next in order, are among them: boolean, of the portion's shape."""
        bits = self._bits(portion)
        if not self._equal:
            return bits > self._least
        equal = (bits == self._least).nonzero()[: self._equal, 0]
        self._equal -= len(equal)
        return (bits > self._least).index_fill_(0, equal, True)

    def _bits(self, numbers: Tensor) -> Tensor:
        return numbers.abs().view(self._kind)

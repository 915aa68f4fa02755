"""The largest numbers of a tensor by magnitude, exactly, without sorting it or holding it: digit by digit.

Magnitudes are ordered as their bits are. One pass over the numbers counts their upper sixteen bits; the next, of those
that begin like the k-th largest, the sixteen bits that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

DIGIT = 16
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Largest:
    """The ``count`` largest magnitudes of what ``portions`` gives, float32 or float64; of equal ones the first.

    Args:
        portions: gives the numbers anew, as often as it is called, in the order in which `of` is then asked.
        dtype: theirs.
        count: how many, at most as many as there are.
    """

    def __init__(self, portions: Callable[[], Iterable[Tensor]], dtype: torch.dtype, count: int) -> None:
        self._kind = INTEGERS[dtype]
        self._least, self._equal = torch.full((), torch.inf, dtype=dtype), 0
        if count:
            self._find(portions, count)
        self._below = self._least.nextafter(torch.zeros_like(self._least))

    def _find(self, portions: Callable[[], Iterable[Tensor]], count: int) -> None:
        found, width = 0, 8 * self._kind.itemsize
        for shift in range(width - DIGIT, -1, -DIGIT):
            counts = torch.zeros(2**DIGIT + 2, dtype=torch.int64)
            for portion in portions():
                # what begins otherwise falls into the bins before and after
                digits = (self._bits(portion) >> shift).sub_(found << DIGIT).clamp_(-1, 2**DIGIT).add_(1)
                counts += torch.bincount(digits, minlength=len(counts))
            # as many as are at least the digit; the k-th largest has the last digit that k of them reach
            reached = counts[1:-1].flip(0).cumsum(0).flip(0)
            digit = int((reached >= count).sum()) - 1
            count -= int(reached[digit] - counts[1 + digit])
            found = found << DIGIT | digit
        self._least, self._equal = torch.tensor(found, dtype=self._kind).view(self._least.dtype), count

    def of(self, portion: Tensor) -> Tensor:
        """The portion, the next in order, with zeros for those that are not among them."""
        if not self._equal:
            return hardshrink(portion, float(self._least))
        kept = hardshrink(portion, float(self._below))
        equal = (portion.abs() == self._least).nonzero()[:, 0]
        kept.index_fill_(0, equal[self._equal :], 0)
        self._equal -= min(self._equal, len(equal))
        return kept

    def _bits(self, numbers: Tensor) -> Tensor:
        return numbers.abs().view(self._kind)

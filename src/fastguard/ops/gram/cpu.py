"""``gram_`` on CPU: the products of ``portable.py``, the other half by csrc/cpu/gram.cpp."""

from __future__ import annotations

import functools

import torch

from fastguard import _extension
from fastguard.ops.gram import portable

_extension.load()

add = functools.partial(portable.add, mirror=torch.ops.fastguard_c.gram_mirror)

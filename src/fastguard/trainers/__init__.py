"""fastguard inside other people's training loops: mixins for HF Trainer and TRL, checkpoints for loops of one's own.

``mixins``      before the trainer class: ``class T(MethodMixin, Trainer)``
``checkpoint``  save and resume a run bit for bit, through torch.distributed.checkpoint
"""

from fastguard.trainers.checkpoint import load, save
from fastguard.trainers.mixins import MethodMixin, NestedMixin, RepNoiseMixin

__all__ = ["MethodMixin", "NestedMixin", "RepNoiseMixin", "load", "save"]

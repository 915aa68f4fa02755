"""fastguard inside other people's training loops: mixins for HF Trainer and TRL, checkpoints for loops of one's own.

``mixins``      before the trainer class: ``class T(MethodMixin, Trainer)``
``checkpoint``  save and resume a run bit for bit, through torch.distributed.checkpoint
``background``  the same while training goes on
``convert``     a checkpoint, sharded or not, as a folder that ``from_pretrained`` loads
"""

from fastguard.trainers.background import BackgroundSaver
from fastguard.trainers.checkpoint import load, save
from fastguard.trainers.convert import Converted, to_huggingface
from fastguard.trainers.mixins import MethodMixin, NestedMixin, RepNoiseMixin

__all__ = [
    "BackgroundSaver",
    "Converted",
    "MethodMixin",
    "NestedMixin",
    "RepNoiseMixin",
    "load",
    "save",
    "to_huggingface",
]

"""What a method is, and which there are: the registry that everything else reads. Free of torch.

A *defense* trains or edits a model so that harmful fine-tuning buys less; an *attack* is the same kind of thing with
the opposite aim. Each is a folder with what its paper adds (``step.py``), its options and its cost on paper, and one
`Entry`. Configuration, command line, planner, training loop, trainers' mixin, evaluation, doctor, examples and
benchmarks know methods by their entries alone.
"""

from fastguard.methods.registry import KINDS, SECTIONS, STAGES, Entry, attacks, defenses, entries, find

__all__ = ["KINDS", "SECTIONS", "STAGES", "Entry", "attacks", "defenses", "entries", "find"]

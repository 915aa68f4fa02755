"""Which parameters safety rests on: scores summed in place during the backward pass, and what is done with them.

``collect``  `Collect`: SNIP, Fisher, Wanda and Gram sums of all weights, in one pass over data
``scores``   `Scores`: what that gives, the scores that are made of it, and its file
``choose``   the most salient entries; those that safety needs and utility does not
``overlap``  how far two choices, or two subspaces, agree
``prune``    set them to 0, or to another model's
``freeze``   hold them during a fine-tuning
``neurons``  or fine-tune them alone, with the optimizer state of nothing else
``act_svd``  the ranks of a map's outputs that safety rests on, taken out or kept alone
"""

from fastguard.saliency.act_svd import act_svd_, keep_top, remove_orthogonal, remove_top, top_subspace
from fastguard.saliency.choose import at_random, set_difference, top, weights_of
from fastguard.saliency.collect import Collect
from fastguard.saliency.freeze import Frozen, freeze
from fastguard.saliency.neurons import Neurons, neurons
from fastguard.saliency.overlap import jaccard, jaccard_by, subspace_overlap
from fastguard.saliency.prune import prune_, pruning
from fastguard.saliency.scores import Scores

__all__ = [
    "Collect",
    "Frozen",
    "Neurons",
    "Scores",
    "act_svd_",
    "at_random",
    "freeze",
    "jaccard",
    "jaccard_by",
    "keep_top",
    "neurons",
    "prune_",
    "pruning",
    "remove_orthogonal",
    "remove_top",
    "set_difference",
    "subspace_overlap",
    "top",
    "top_subspace",
    "weights_of",
]

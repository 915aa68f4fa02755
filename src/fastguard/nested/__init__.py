"""Simulated attacks inside a training step: tamper with the weights, read a gradient there, put them back bit for bit.

``attack``       K steps of an attacker's optimizer, gradients read on the way
``perturbation`` one step along a given direction, and how much of it the dtype kept
``linearised``   the same pass as base product plus scaled product, for weights that cannot hold the step
``audit``        the exact gradient of an attack, and how far a first-order one is from it
``tangent``      the exact product of the Hessian with a direction, where a step stands for its derivative
``activations``  a step of the activations instead of the weights
``reference``    the initial weights, exchanged with the live ones for the length of a forward
``adversary``    an attacker that trains LoRA adapters only
``attackers``    several such attackers, each with adapters of his own, in one forward
``persistent``   an attacker who is kept from one attack to the next
``weights``      trainable parameters as local tensors, sharded ones included
``guard``        whatever is raised, what was changed is put back; random numbers, seeds, ranks
``narrow``       how much of an attacker's steps bf16 keeps, and masters that keep all
``waiting``      the training optimizer's states, in host memory meanwhile
``snapshot``     where the original waits in the meantime
``optimizers``   the attacker's optimizers
``profile``      what of a step is no model pass: the rest of the engine reports it while somebody listens
"""

from fastguard.nested.activations import ActivationPerturbation
from fastguard.nested.adversary import LoRAAdversary
from fastguard.nested.attack import SimulatedAttack, Tampered
from fastguard.nested.attackers import LoRAAttackers
from fastguard.nested.audit import Audit, audit
from fastguard.nested.linearised import linearised
from fastguard.nested.optimizers import SGD, AdamW
from fastguard.nested.persistent import PersistentAttacker
from fastguard.nested.perturbation import PerturbationLostError, Realised, perturbed
from fastguard.nested.reference import Reference
from fastguard.nested.snapshot import Snapshot
from fastguard.nested.tangent import hessian_product
from fastguard.nested.waiting import Waiting
from fastguard.nested.weights import Weights

__all__ = [
    "SGD",
    "ActivationPerturbation",
    "AdamW",
    "Audit",
    "LoRAAdversary",
    "LoRAAttackers",
    "PersistentAttacker",
    "PerturbationLostError",
    "Realised",
    "Reference",
    "SimulatedAttack",
    "Snapshot",
    "Tampered",
    "Waiting",
    "Weights",
    "audit",
    "hessian_product",
    "linearised",
    "perturbed",
]

"""What a step consists of: parts that take time, items that take memory.

A part is work: flops of its products, bytes that it moves to and from the GPU's memory, other GPUs and the host. An
item is memory, and the moments of a step at which it is held; the peak is the moment at which most is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastguard.plan.setting import FP32, Setting


@dataclass(frozen=True)
class Pass:
    """A pass of the model over one batch, of which a part is the forward or the backward.

    Attributes:
        samples: sequences of the batch. gradients: that the backward is for: ``weights``, ``activations`` or ``none``.
        stop: the layer at whose attention output the backward ends; None: at the embedding.
    """

    name: str
    samples: int
    gradients: str = "weights"
    stop: float | None = None


@dataclass(frozen=True)
class Part:
    """One GPU's share of some work in a step.

    Attributes:
        kind: ``model`` (layers, forward and backward), ``head`` (everything against the vocabulary) or ``weights``
            (element-wise passes over the weights, noise, statistics).
        count: how often a step does it; the other figures are for all of them.
        flops: of matrix products. memory, network, host: bytes. node: bytes to the GPUs of the node, in collectives
            that wait for their products (tensor parallelism). of: the pass that it is a direction of.
    """

    name: str
    kind: str
    count: float = 1
    flops: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    host: float = 0.0
    node: float = 0.0
    of: Pass | None = None

    def times(self, count: float) -> Part:
        """This part so many times a step."""
        return replace(
            self, count=self.count * count, flops=self.flops * count, memory=self.memory * count,
            network=self.network * count, host=self.host * count, node=self.node * count,
        )  # fmt: skip

    def needs(self, s: Setting) -> dict[str, float]:
        """Seconds that it needs of each, were it alone: compute, bandwidth (of the memory), network and host."""
        e, gpu = s.efficiency, s.gpu
        return {
            "compute": self.flops / (gpu.flops * s.matmul),
            "bandwidth": self.memory / (gpu.bandwidth * e.memory),
            "network": self.network / (gpu.collective(s.gpus) * e.network) + self.node / (gpu.nvlink * e.network),
            "host": self.host / (gpu.host * e.host),
        }

    def seconds(self, s: Setting) -> float:
        """Products or memory, whichever takes longer; collectives beyond what hides behind it; then the host."""
        e, needs = s.efficiency, self.needs(s)
        own = max(needs["compute"], needs["bandwidth"])
        waiting = self.node / (s.gpu.nvlink * e.network)
        return own + max(needs["network"] - waiting - e.overlap * own, 0.0) + waiting + needs["host"]


@dataclass(frozen=True)
class Item:
    """Bytes of one GPU (``host``: of the host, for one GPU) and the moments at which they are held; None is always."""

    name: str
    bytes: float
    moments: frozenset[str] | None = None
    host: bool = False


def item(name: str, size: float, *moments: str) -> Item:
    """An item of those moments, or of all."""
    return Item(name, size, frozenset(moments) if moments else None)


def held(items: Iterable[Item], moment: str) -> list[Item]:
    """What is on the GPU at a moment."""
    return [i for i in items if not i.host and (i.moments is None or moment in i.moments)]


def moments(items: Iterable[Item]) -> list[str]:
    """All moments, in the order in which they are named; a single one if everything is always held."""
    found = dict.fromkeys(m for i in items for m in sorted(i.moments or ()))
    return list(found) or ["always"]


def peak(items: Sequence[Item]) -> tuple[str, float]:
    """The moment at which most is held on the GPU, and how much."""
    sizes = {m: sum(i.bytes for i in held(items, m)) for m in moments(items)}
    worst = max(sizes, key=lambda m: sizes[m])
    return worst, sizes[worst]


def weights_item(s: Setting) -> Item:
    """The shard of the weights."""
    frozen = 0 if s.lora is None else s.architecture.parameters / s.gpus * s.precision.compute
    return item("weights", frozen + s.shard * s.precision.weights)


def outer_bytes(s: Setting) -> float:
    """The outer AdamW's two moments of the shard."""
    return 2 * s.shard * s.precision.moments


def resident(s: Setting) -> list[Item]:
    """What every defense holds all the time: the shard of the weights, and the outer AdamW's moments of it."""
    return [weights_item(s), item("outer optimizer", outer_bytes(s))]


# Passes over the shard of the weights. Each tensor is read or written once: the bytes are the floor.


def over_weights(s: Setting, name: str, bytes_each: float, count: float = 1, host_each: float = 0.0) -> Part:
    """An element-wise pass: so many bytes of memory, and of the host's bus, for each trainable parameter."""
    return Part(name, "weights", 1, memory=s.shard * bytes_each, host=s.shard * host_each).times(count)


def adamw(s: Setting, name: str, moment: int, count: float = 1) -> Part:
    """Reads parameter, gradient and two moments; writes parameter and moments."""
    w = s.precision.weights
    return over_weights(s, name, 3 * w + 4 * moment, count)


def outer_adamw(s: Setting) -> Part:
    """The defender's own step."""
    return adamw(s, "outer AdamW", s.precision.moments)


def snapshot(s: Setting) -> Part:
    """Reads and writes every weight; on the host it crosses the bus instead of being written."""
    w = s.precision.weights
    host = s.snapshot == "host"
    return over_weights(s, "snapshot", w if host else 2 * w, host_each=w if host else 0)


def restore(s: Setting) -> Part:
    """The snapshot's way back."""
    return replace(snapshot(s), name="restore")


def snapshot_item(s: Setting, *when: str) -> Item:
    """The copy of the weights, on the device or on the host."""
    size = s.shard * s.precision.weights
    return Item("snapshot", size, frozenset(when), host=s.snapshot == "host")


def accumulate(s: Setting, name: str, count: float = 1, accumulator: int = FP32) -> Part:
    """accumulator += weight * gradient: reads both, writes one."""
    return over_weights(s, name, 2 * accumulator + s.precision.weights, count)

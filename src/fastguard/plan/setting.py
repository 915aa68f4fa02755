"""The job that is planned: model, GPUs, batch, precision, and how much of each peak a program gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from fastguard.plan.architecture import Architecture
from fastguard.plan.hardware import GPU, H100


@dataclass(frozen=True)
class Precision:
    """Bytes of a number, by what it is for.

    Attributes:
        weights: a trainable parameter, and its gradient once it is sharded, as the optimizer sees them.
        compute: gathered weights, frozen weights and activations. reduce: a gradient while ranks add theirs up.
        moments: each of the outer AdamW's two. Accumulators and the inner AdamW's moments are fp32 always.
    """

    name: str
    weights: int
    compute: int
    reduce: int
    moments: int


PRECISIONS = {
    "mixed": Precision("mixed", weights=4, compute=2, reduce=4, moments=4),
    "bf16": Precision("bf16", weights=2, compute=2, reduce=2, moments=2),
    "fp32": Precision("fp32", weights=4, compute=4, reduce=4, moments=4),
}
"""``mixed``: fp32 masters, products in bf16, gradients reduced in fp32 (FSDP2's MixedPrecisionPolicy)."""

FP32 = 4


@dataclass(frozen=True)
class Efficiency:
    """What part of a data sheet's peak a program gets. Assumptions, all of them; each can be replaced.

    Attributes:
        matmul: of the flop/s, over a whole pass: it covers the element-wise work between the products.
        memory: of the memory's bandwidth, in passes over weights. network: of NVLink or the network, in collectives.
        host: of PCIe. overlap: of a pass's products, the part behind which its collectives can hide.
        usable: of the memory, what is left beside the CUDA context, NCCL's buffers and fragmentation.
    """

    matmul: float = 0.4
    memory: float = 0.8
    network: float = 0.7
    host: float = 0.7
    overlap: float = 0.9
    usable: float = 0.9

    @classmethod
    def parse(cls, text: str) -> Efficiency:
        """From ``matmul=0.5,network=0.6``; what is not named keeps its default. Raises ValueError."""
        names = [f.name for f in dataclasses.fields(cls)]
        values: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = item.partition("=")
            if key not in names:
                raise ValueError(f"efficiency: expected one of {', '.join(names)} before '=', got {item!r}")
            try:
                values[key] = float(value)
            except ValueError:
                raise ValueError(f"efficiency: {key}: expected a number, got {value!r}") from None
            if not (0 < values[key] <= 1 or (key == "overlap" and values[key] == 0)):
                raise ValueError(f"efficiency: {key}: expected a share in (0, 1], got {value}")
        return cls(**values)


@dataclass(frozen=True)
class Setting:
    """A method's job on a number of GPUs, the model sharded over all of them by FSDP2.

    Attributes:
        batch: sequences a GPU, of every batch that a step reads. tokens: length of each.
        rows: share of a paired batch's positions that carry loss. live: share of the vocabulary that the backward of a
            lens computes (docs/performance.md, live columns).
        given: the options of the method that were asked for by name. Where the published run has a proportion (an
            attacker's batch to the defender's) a cost keeps it, unless the option was given.
        cpu: whether it is a CPU's kernels that compute, of which some make fewer products: for what is run in tests.
        attention: ``flash`` computes half of the causal scores and keeps none; ``eager`` computes and keeps all.
        lora: rank of adapters on all projections, the rest frozen in the compute dtype; None trains all weights.
        snapshot: where the original waits during a simulated attack, ``device`` or ``host``.
    """

    architecture: Architecture
    gpus: int = 64
    gpu: GPU = H100
    batch: int = 8
    tokens: int = 2048
    steps: int = 1000
    rows: float = 0.5
    live: float = 0.02
    precision: Precision = PRECISIONS["mixed"]
    checkpointing: bool = True
    attention: str = "flash"
    cpu: bool = False
    lora: int | None = None
    snapshot: str = "device"
    given: frozenset[str] = frozenset()
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        for name in ("gpus", "batch", "tokens", "steps", "lora"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {value}")
        for name in ("rows", "live"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {getattr(self, name)}")
        for name, choices in (("attention", ("flash", "eager")), ("snapshot", ("device", "host"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.lora is not None:
            self.architecture.adapter(self.lora)  # refuses a mixture of experts

    @property
    def trainable(self) -> int:
        """Parameters that are trained: all, or the adapter's."""
        a = self.architecture
        return a.parameters if self.lora is None else a.adapter(self.lora)

    @property
    def shard(self) -> float:
        """Trainable parameters of one GPU's shard."""
        return self.trainable / self.gpus

    @property
    def gathers(self) -> bool:
        """Whether a layer's weights exist a second time while it computes: gathered from other ranks, or cast."""
        return self.gpus > 1 or self.precision.weights != self.precision.compute

    @property
    def moved(self) -> float:
        """The part of a gathered tensor that comes from other GPUs, (n - 1) / n."""
        return (self.gpus - 1) / self.gpus

    def with_batch(self, batch: int) -> Setting:
        """The same job with another batch."""
        return dataclasses.replace(self, batch=batch)

"""The job that is planned: model, GPUs, batch, precision, levers, and how much of each peak a program gets."""

from __future__ import annotations

import dataclasses
import math
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
    """What part of a data sheet's peak a program gets. Each can be replaced; all but ``matmul`` are assumptions.

    Attributes:
        matmul: of the flop/s, over a whole pass: it covers the element-wise work between the products. None: the GPU's,
            which comes from a published run (`hardware.Throughput`).
        memory: of the memory's bandwidth, in passes over weights. network: of NVLink or the network, in collectives.
        host: of PCIe. overlap: of a pass's products, the part behind which its collectives can hide.
        usable: of the memory, what is left beside the CUDA context, NCCL's buffers and fragmentation.
    """

    matmul: float | None = None
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


KEEP_LOGITS_BYTES = 128 * 2**20
"""As ``ops.lm_head_stats`` has it for a CPU."""

ADVERSARIES = ("weights", "lora", "resident")


@dataclass(frozen=True)
class Setting:
    """A method's job on a number of GPUs, the model sharded over all of them by FSDP2.

    Attributes:
        global_batch: sequences of every batch that a step reads, over all GPUs. tokens: length of each.
        rows: share of a paired batch's positions that carry loss. live: share of the vocabulary that the backward of a
            lens computes (docs/performance.md, live columns).
        given: the options of the method that were asked for by name. Where the published run has a proportion (an
            attacker's batch to the defender's) a cost keeps it, unless the option was given.
        cpu: whether it is a CPU's kernels that compute, of which some make fewer products: for what is run in tests.
        attention: ``flash`` computes half of the causal scores and keeps none; ``eager`` computes and keeps all.
        lora: rank of adapters on all projections, the rest frozen in the compute dtype; None trains all weights.
        keep_logits_bytes: up to how many bytes of logits an exact head keeps for its backward; None is what the ops do
            unless told: `KEEP_LOGITS_BYTES` on a CPU, nothing on a GPU.

    Levers that leave a step's numbers as they are (``levers.EXACT``):
        micro: sequences that a GPU takes at a time, gradients added up; None takes a batch as a whole.
        late_head: the head is gathered where it is first used and released after its last use; its gradient is reduced
            then, in blocks. Otherwise both are there from the forward to the end of the backward.
        own_groups: embedding and [norm, head] are FSDP groups of their own, not of the root, which stays gathered.
        snapshot: where the original waits during a simulated attack, ``device`` or ``host``. outer: where the outer
            optimizer's moments wait meanwhile. reference: where a reference's hidden states wait for the live ones'.

    Levers that do not (``levers.DEVIATIONS``), of methods that simulate an attacker:
        attack_reduce: bytes of a gradient while ranks add it up, in the attacker's steps; None: the precision's.
        attack_moments: bytes of each of the attacker's optimizer's moments.
        adversary: what the attacker trains: ``weights``; ``lora``, adapters of ``adversary_rank`` on a base that is
            frozen; ``resident``, the same on a base that lies in each node in the compute dtype, tensor-parallel, with
            an attacker of its own in each node.
        persistent: whether an attacker is kept from one of the defender's steps to the next. He goes ``fresh`` steps
            further in each, and starts anew when he has made as many as the others.
    """

    architecture: Architecture
    gpus: int = 64
    gpu: GPU = H100
    global_batch: int = 64
    tokens: int = 256
    steps: int = 1000
    rows: float = 0.5
    live: float = 0.02
    precision: Precision = PRECISIONS["mixed"]
    checkpointing: bool = True
    attention: str = "flash"
    cpu: bool = False
    lora: int | None = None
    keep_logits_bytes: int | None = None
    micro: int | None = None
    late_head: bool = False
    own_groups: bool = False
    snapshot: str = "device"
    outer: str = "device"
    reference: str = "device"
    attack_reduce: int | None = None
    attack_moments: int = FP32
    adversary: str = "weights"
    adversary_rank: int = 16
    persistent: bool = False
    fresh: int = 8
    given: frozenset[str] = frozenset()
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        whole = ("gpus", "global_batch", "tokens", "steps", "lora", "micro", "attack_reduce", "attack_moments",
                 "adversary_rank", "fresh")  # fmt: skip
        for name in whole:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer of 1 or more, got {value}")
        if self.keep_logits_bytes is not None and self.keep_logits_bytes < 0:
            raise ValueError(f"keep_logits_bytes: expected 0 or more, or None, got {self.keep_logits_bytes}")
        for name in ("rows", "live"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {getattr(self, name)}")
        places = ("device", "host")
        words = {"attention": ("flash", "eager"), "snapshot": places, "outer": places, "reference": places,
                 "adversary": ADVERSARIES}  # fmt: skip
        for name, choices in words.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.lora is not None:
            self.architecture.adapter(self.lora)  # refuses a mixture of experts

    def share(self, sequences: int) -> int:
        """Sequences a GPU of a global batch of so many: at least one."""
        return math.ceil(sequences / self.gpus)

    @property
    def batch(self) -> int:
        """Sequences a GPU of the global batch."""
        return self.share(self.global_batch)

    def rounded(self, what: str, sequences: int) -> tuple[str, ...]:
        """What is to be said of a global batch that the GPUs cannot have in equal parts; empty where they can."""
        whole = self.share(sequences) * self.gpus
        if whole == sequences:
            return ()
        return (f"{what}: {sequences} sequences are rounded up to {whole}, {self.share(sequences)} a GPU",)

    def chunks(self, samples: int) -> int:
        """Micro-batches of a GPU's batch of so many."""
        return 1 if self.micro is None else math.ceil(samples / self.micro)

    def at_once(self, samples: int) -> int:
        """Sequences of the largest of these micro-batches."""
        return math.ceil(samples / self.chunks(samples))

    def kept_rows(self, rows: float) -> float:
        """Of so many rows of a batch, those whose logits an exact head keeps for its backward."""
        budget = self.keep_logits_bytes
        if budget is None:
            budget = KEEP_LOGITS_BYTES if self.cpu else 0
        return min(rows, budget // (self.architecture.vocabulary * self.precision.compute))

    @property
    def matmul(self) -> float:
        """The share of the products' peak that a pass gets."""
        return self.efficiency.matmul or self.gpu.matmul

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
    def grouped(self) -> bool:
        """Whether embedding, and norm with head, are groups of their own: on one GPU there are none."""
        return self.own_groups and self.gpus > 1

    @property
    def moved(self) -> float:
        """The part of a gathered tensor that comes from other GPUs, (n - 1) / n."""
        return (self.gpus - 1) / self.gpus

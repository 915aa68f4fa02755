"""GPUs as their makers' data sheets describe them, and what share of a peak published training runs had.

The figures of a data sheet are peaks. What a program gets of them is an efficiency (``setting.Efficiency``): that of
products is a GPU's own, worked out of public throughputs (``Throughput``); the others are assumed, the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """A training run that was published.

    Attributes:
        model: by its name in `architecture.MODELS`. tokens: length of a sequence. recomputed: whether under full
            activation checkpointing; a selective one recomputes next to no products and counts as none.
        per_second: tokens a second and GPU, bf16 products.
        source: where it is published.
    """

    model: str
    tokens: int
    recomputed: bool
    per_second: float
    source: str


@dataclass(frozen=True)
class GPU:
    """One GPU and its part of the node.

    Attributes:
        flops: dense bf16 products with fp32 accumulation, a second (the data sheets print twice that, "with sparsity").
        memory: bytes that the driver leaves to programs, as PyTorch reports them; the name of an "80 GB" card is less.
        bandwidth: of that memory, bytes a second.
        nvlink: bytes a second to the other GPUs of the node, in one direction (data sheets add up both).
        network: bytes a second to other nodes, in one direction: its own network card's.
        host: bytes a second to host memory, in one direction (PCIe x16).
        per_node: GPUs that NVLink connects.
        source: the public data sheet.
        matmul: the share of ``flops`` that a training pass gets, element-wise work between the products included;
            that of ``throughput``, which may be another GPU's of the same processor.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    host: float
    per_node: int
    source: str
    matmul: float
    throughput: Throughput

    def collective(self, gpus: int) -> float:
        """Bytes a second that each of ``gpus`` GPUs receives in an all-gather (or sends in a reduce-scatter).

        Inside a node NVLink is the limit. Across nodes each byte enters a node once, spread over the network cards of
        all its GPUs, and is handed on by NVLink: a node of 8 takes in 8 cards' worth for all of its GPUs.
        """
        if gpus <= self.per_node:
            return self.nvlink
        return min(self.nvlink, self.per_node * self.network)


GIB = 2**30

H100 = GPU(
    "h100", flops=989.4e12, memory=79 * GIB, bandwidth=3.35e12, nvlink=450e9, network=50e9, host=64e9, per_node=8,
    source="NVIDIA H100 Tensor Core GPU data sheet (SXM), NVIDIA DGX H100 data sheet",
    matmul=0.36,
    throughput=Throughput(
        "llama-3-70b", 8192, True, 625,
        "torchtitan, benchmarks/asyncTP_llama3_h100_2025-06: 70B, FSDP 32 x TP 8, compiled, 597 (652 with async TP)",
    ),
)  # fmt: skip
H200 = GPU(
    "h200", flops=989.4e12, memory=139 * GIB, bandwidth=4.8e12, nvlink=450e9, network=50e9, host=64e9, per_node=8,
    source="NVIDIA H200 Tensor Core GPU data sheet (SXM), NVIDIA DGX H200 data sheet",
    matmul=H100.matmul, throughput=H100.throughput,  # the same processor; no bf16 figure of its own was found
)  # fmt: skip
A100 = GPU(
    "a100-80g", flops=312e12, memory=79 * GIB, bandwidth=2.039e12, nvlink=300e9, network=25e9, host=32e9, per_node=8,
    source="NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM), NVIDIA DGX A100 data sheet",
    matmul=0.6,
    throughput=Throughput(
        "llama-3-70b", 8192, True, 331, "torchtitan, docs/performance.md of 2024: 70B, FSDP2 on 64, compiled"
    ),
)  # fmt: skip
B200 = GPU(
    "b200", flops=2250e12, memory=178 * GIB, bandwidth=8e12, nvlink=900e9, network=50e9, host=64e9, per_node=8,
    source="NVIDIA DGX B200 data sheet",
    matmul=0.19,
    throughput=Throughput(
        "llama-3-8b", 8192, False, 8307.5,
        "torchao, prototype/mx_formats/README.md of 2025-08: 8B, FSDP2 on 8, compiled, power-limited",
    ),
)  # fmt: skip

GPUS = {gpu.name: gpu for gpu in (H100, H200, A100, B200)}


def find(name: str) -> GPU:
    """The GPU of that name. Raises ValueError."""
    if name.lower() not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]

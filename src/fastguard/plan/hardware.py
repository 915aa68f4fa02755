"""GPUs as their makers' data sheets describe them.

Every figure is a peak; what a program gets of it is an efficiency that the user states (``setting.Efficiency``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU and its part of the node.

    Attributes:
        flops: dense bf16 products with fp32 accumulation, a second (the data sheets print twice that, "with sparsity").
        memory: bytes. bandwidth: of that memory, bytes a second.
        nvlink: bytes a second to the other GPUs of the node, in one direction (data sheets add up both).
        network: bytes a second to other nodes, in one direction: its own network card's.
        host: bytes a second to host memory, in one direction (PCIe x16).
        per_node: GPUs that NVLink connects.
        source: the public data sheet.
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

    def collective(self, gpus: int) -> float:
        """Bytes a second that each of ``gpus`` GPUs receives in an all-gather (or sends in a reduce-scatter).

        Inside a node NVLink is the limit. Across nodes each byte enters a node once, spread over the network cards of
        all its GPUs, and is handed on by NVLink: a node of 8 takes in 8 cards' worth for all of its GPUs.
        """
        if gpus <= self.per_node:
            return self.nvlink
        return min(self.nvlink, self.per_node * self.network)


H100 = GPU(
    "h100", flops=989.4e12, memory=80e9, bandwidth=3.35e12, nvlink=450e9, network=50e9, host=64e9, per_node=8,
    source="NVIDIA H100 Tensor Core GPU data sheet (SXM), NVIDIA DGX H100 data sheet",
)  # fmt: skip
H200 = GPU(
    "h200", flops=989.4e12, memory=141e9, bandwidth=4.8e12, nvlink=450e9, network=50e9, host=64e9, per_node=8,
    source="NVIDIA H200 Tensor Core GPU data sheet (SXM), NVIDIA DGX H200 data sheet",
)  # fmt: skip
A100 = GPU(
    "a100-80g", flops=312e12, memory=80e9, bandwidth=2.039e12, nvlink=300e9, network=25e9, host=32e9, per_node=8,
    source="NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM), NVIDIA DGX A100 data sheet",
)  # fmt: skip
B200 = GPU(
    "b200", flops=2250e12, memory=180e9, bandwidth=8e12, nvlink=900e9, network=50e9, host=64e9, per_node=8,
    source="NVIDIA DGX B200 data sheet",
)  # fmt: skip

GPUS = {gpu.name: gpu for gpu in (H100, H200, A100, B200)}


def find(name: str) -> GPU:
    """The GPU of that name. Raises ValueError."""
    if name.lower() not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]

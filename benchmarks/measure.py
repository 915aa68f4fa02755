"""What the benchmarks measure with: peak memory, the machine's matrix rate, who it is.

Every figure a benchmark reports is taken in the same run as the peers it is compared with.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Memory above what was held before, at the worst moment of ``run``.

    On a GPU the allocator counts; on a CPU the kernel's high-water mark of the process, reset first, does.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return max(resident("VmHWM") - before, 0)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], Any], rounds: int = 5, device: str = "cpu") -> float:
    """Median wall-clock of ``run`` after one warm-up."""
    run()
    synchronize(device)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Measured flop/s of [rows, inner] @ [inner, columns], the shape whose rate an op is compared with."""
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(columns, inner, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns / median_seconds(lambda: torch.mm(a, b.t(), out=out), 7, device)


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices at least as fast as fp32 ones (AMX, AVX512-BF16)."""
    return gemm_rate(256, 576, 4096, torch.bfloat16) > gemm_rate(256, 576, 4096, torch.float32)


def machine() -> dict[str, Any]:
    """Processor, instruction set, threads, versions."""
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    info = {
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    try:
        import triton

        info["triton"] = triton.__version__
    except ImportError:
        info["triton"] = None
    return info

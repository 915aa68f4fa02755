"""What is measured of merges: SmolLM2 and a second checkpoint beside it, merged onto the disk.

    python benchmarks/end_to_end/merging_work.py fastguard linear FOLDER 3

prints one JSON line: seconds of each round until the bytes are on the disk, and the peak of resident memory above what
the imports took. Every contender runs in a process of its own, mergekit in an environment of its own (whose Python
runs this file, so that it imports nothing of fastguard). ``copy`` reads both checkpoints and writes one.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

METHODS = ("linear", "slerp", "ties", "dare_linear")
"""Those that both know."""
DENSITY = 0.5


def prepare(folder: Path) -> None:
    """``FOLDER/one``: SmolLM2-135M-Instruct in bf16. ``FOLDER/two``: it with noise of the size of a fine-tuning."""
    import torch
    from safetensors.torch import load_file, save_file

    from fastguard import models

    source, g = Path(models.resolve(models.SMOLLM2)), torch.Generator().manual_seed(0)
    for name, noise in (("one", 0.0), ("two", 1e-2)):
        (folder / name).mkdir(parents=True)
        tensors = {}
        for key, t in load_file(source / "model.safetensors").items():
            tensors[key] = (t + noise * torch.randn(t.shape, generator=g)).to(torch.bfloat16)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, folder / name)


def run(contender: str, method: str, folder: Path) -> None:
    """One merge into ``FOLDER/out``."""
    {"fastguard": _fastguard, "mergekit": _mergekit, "copy": _copy}[contender](method, folder)


def _fastguard(method: str, folder: Path) -> None:
    from fastguard import merging

    options: dict[str, Any] = {"density": DENSITY} if method.startswith(("ties", "dare")) else {}
    models = [folder / "one", folder / "two"] if method == "linear" else [folder / "two"]
    merging.merge(method, models, folder / "out", base=None if method == "linear" else folder / "one", options=options)


def _mergekit(method: str, folder: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    one, two = str(folder / "one"), str(folder / "two")
    dense = {"density": DENSITY} if method.startswith(("ties", "dare")) else {}
    weighted = {"weight": 1.0, **dense} if method != "slerp" else {}
    tree: dict[str, Any] = {"merge_method": method, "models": [{"model": two, "parameters": weighted}]}
    if method == "linear":
        tree["models"] += [{"model": one, "parameters": weighted}]
    else:
        tree["base_model"] = one
        tree["parameters"] = {"t": 0.5} if method == "slerp" else {}
    options = MergeOptions(copy_tokenizer=True, quiet=True, lazy_unpickle=True, low_cpu_memory=False)
    run_merge(MergeConfiguration.model_validate(tree), str(folder / "out"), options=options)
    for path in (folder / "out").glob("*.safetensors"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _copy(method: str, folder: Path) -> None:
    (folder / "out").mkdir()
    portion = bytearray(2**22)
    view = memoryview(portion)
    with open(folder / "out" / "model.safetensors", "wb") as out:
        for name in ("one", "two"):
            with open(folder / name / "model.safetensors", "rb") as file:
                while count := file.readinto(portion):
                    if name == "one":
                        out.write(view[:count])
        out.flush()
        os.fsync(out.fileno())


def main() -> None:
    contender, method, folder, rounds = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    if contender == "fastguard":
        import fastguard.merging.apply  # noqa: F401
    elif contender == "mergekit":
        import mergekit.merge  # noqa: F401
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(rounds):
        shutil.rmtree(folder / "out", ignore_errors=True)
        start = time.perf_counter()
        run(contender, method, folder)
        seconds.append(time.perf_counter() - start)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()

"""One of several processes that train every method as one does: RANK STORE RANKS TENSOR MODEL ALONE.

Each immunization, from the same model and data, must leave the weights that one process left which saw the whole
batches (in the folder ALONE): to 1e-6 of the distance that they moved, in float64. Prints a line per case; raises at
the first that fails.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastguard import parallel
from fastguard.run.config import ParallelConfig
from recipes import SHARED, trained

UNDIVIDED = ("sn_tune", "rsn_tune")
"""Those that choose rows of whole matrices, and say so where these are divided."""


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name] - b[name]).square().sum() for name in a) ** 0.5)


def refused(shared: torch.nn.Module, name: str) -> None:
    try:
        trained(shared, name)
    except ValueError as error:
        assert "tensor parallel" in str(error) or "tensor-parallel" in str(error), error
    else:
        raise AssertionError(f"{name} was not refused")


def main() -> None:
    rank, world, tensor = (int(sys.argv[i]) for i in (1, 3, 4))
    store, source, alone = sys.argv[2], sys.argv[5], Path(sys.argv[6])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    layout = ParallelConfig(tensor=tensor)
    first = {k: v.double() for k, v in load_file(Path(source) / "model.safetensors").items()}
    for name in SHARED:
        shared = parallel.load_model(source, torch.float64, layout)
        if tensor > 1 and name in UNDIVIDED:
            refused(shared, name)
        else:
            out = Path(store).with_name(f"{world} {name}")
            parallel.save_model(trained(shared, name), None, out)
            found = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
            wanted = load_file(alone / name / "model.safetensors")
            assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
            moved, apart = distance(wanted, first), distance(found, wanted)
            assert moved > 1e-3 and apart < 1e-6 * moved, f"{name}: {apart} of {moved}"
        print(f"passed: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

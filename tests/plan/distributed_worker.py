"""One of two processes whose memory and collectives are counted under FSDP2: ``python distributed_worker.py RANK
STORE``.

Prints a JSON line per case: what was counted on this rank, and what the plan of two GPUs says.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastguard import methods
from plan.live import Watch, held_by
from plan.workloads import PUBLISHED, TINY, Method, build, clear, for_options, ids, options_of, planned, setting

CASES = {
    "published sft": {"checkpointing": True},
    "published sft, nothing recomputed": {"checkpointing": False},
    "sft": {"checkpointing": True},
    "sft, groups of their own": {"checkpointing": True, "own_groups": True},
    "booster, groups of their own": {"checkpointing": True, "own_groups": True},
    "booster": {"checkpointing": True},
    "tar": {"checkpointing": True},
    "random_mapping": {"checkpointing": True},
    "crl": {"checkpointing": True},
    "circuit_breaker, a layer left out": {"checkpointing": True, "layers": [1]},
    "seam, product": {"checkpointing": True, "product": "difference"},
}
"""A method's name, here or as published, and after a comma what is special."""


def shard(model: torch.nn.Module, own_groups: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if own_groups:
        fully_shard(model.model.embed_tokens, mesh=mesh, mp_policy=policy)
        model.model.embed_tokens.set_unshard_in_backward(False)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def run(name: str, checkpointing: bool, own_groups: bool = False, **changes: Any) -> dict[str, float]:
    torch.manual_seed(0)
    model = build({**TINY, "num_hidden_layers": 3}, "fp32", checkpointing)
    s = setting(model, "mixed", checkpointing, gpus=2, own_groups=own_groups)
    name, published = name.partition(",")[0].removeprefix("published "), name.startswith("published ")
    entry = methods.find(name)
    options = options_of(entry, **changes)
    s = for_options(s, options)
    recipe = (entry.load_cost().published if published else entry.load_cost().here)(s, options)
    shard(model, own_groups)  # before the method: what it keeps of the weights is of the shards
    step = PUBLISHED[name](model)[0] if published else Method(entry, model, s, options).step
    watch = Watch(held_by(model), resized=True)
    with watch.on():
        model(input_ids=ids(0), use_cache=False).logits.sum().backward()  # FSDP2 makes its buffers
        clear(model)
        watch.reset()
        step()
    flops, memory = planned(recipe)
    return {
        "flops": watch.flops, "planned_flops": flops, "memory": watch.peak, "planned_memory": memory,
        "network": (watch.gathered + watch.scattered) * s.moved,
        "planned_network": sum(part.network for part in recipe.parts),
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, options in CASES.items():
        print(json.dumps({"case": name, **run(name, **options)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

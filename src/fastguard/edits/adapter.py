"""The same cut as a LoRA adapter that PEFT loads: nothing of the model is written again.

Orthogonalisation has rank K, so that A = Q W and B = -Q^T are exact. The norm-preserving forms change a weight in
full rank; of their change the best approximation of the rank asked for is kept, and how much is lost is returned.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastguard.directions.edit import FORMS, checked_basis
from fastguard.edits.ablate import bases_of, chosen_writes
from fastguard.edits.shards import Folder, as_tensor, read_bytes
from fastguard.edits.stream import source_folder
from fastguard.edits.writes import BIAS, MATRIX, Writes, residual_writes
from fastguard.low_rank import top_svd
from fastguard.progress import Progress, silent


@dataclass(frozen=True)
class Adapted:
    """The adapter's folder, its rank, and by module the relative error |dW - B A| / |dW| (0 where it is exact)."""

    folder: Path
    rank: int
    errors: dict[str, float]


def adapter(
    model: str | Path | Folder, out: str | Path, basis: Tensor, form: str = "orthogonal", *, rank: int | None = None,
    overwrite: bool = False, progress: Progress = silent,
) -> Adapted:  # fmt: skip
    """Write ``out``, a PEFT adapter that does to ``model`` what the edit of the same form does.

    A tied head stays the model's own, since PEFT adapts the embedding alone: the same as the edit that unties it.

    Args:
        model: a folder with safetensors, a Hub id, or what `source_folder` gave.
        out: the folder; it appears whole or not at all.
        basis, form: as in `ablation`.
        rank: of the adapters; K at least. ``orthogonal`` needs no more than K, and gets K.
        overwrite: replace ``out`` if it is there.

    Raises:
        ValueError: what `ablation` refuses; a rank below K; weights that no adapter can change: experts that share a
            parameter, biases with a part along the directions.
        FileExistsError: ``out`` is there.
    """
    source = model if isinstance(model, Folder) else source_folder(model)
    if form not in FORMS:
        raise ValueError(f"form: expected {', '.join(FORMS)}, got {form!r}")
    rows = checked_basis(basis)
    if rank is not None and rank < len(rows):
        raise ValueError(f"rank: expected at least the {len(rows)} directions, got {rank}")
    rank = len(rows) if rank is None or form == "orthogonal" else rank
    target = Path(out)
    if target.exists() and not (target.is_dir() and (overwrite or not any(target.iterdir()))):
        raise FileExistsError(f"out: {str(target)!r} is there; overwrite=True replaces it")
    if target.resolve() == source.path.resolve() or target.resolve() in source.path.resolve().parents:
        raise ValueError(f"out: {str(target)!r} is, or holds, {str(source.path)!r}, which is read")
    writes = residual_writes(source)
    tensors, errors = _factors(source, writes, rows, form, rank, progress)
    given = str(source.path) if isinstance(model, Folder) else str(model)
    transposed = any(w.kind == MATRIX and w.axis == 1 for w in writes.tensors.values())
    _save(target, given, sorted(errors), rank, transposed, tensors)
    worst = max(errors.values())
    progress("edit", 1.0, f"{len(errors)} modules at rank {rank}, largest error {worst:.2g}")
    return Adapted(target, rank, errors)


def _factors(
    source: Folder, writes: Writes, rows: Tensor, form: str, rank: int, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, float]]:
    chosen = chosen_writes(writes, form)
    bases = bases_of(source, chosen, rows)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    done = 0
    for shard in source.shards:
        with open(shard.path, "rb") as file:
            for stored in shard.tensors:
                if stored.name not in chosen:
                    continue
                write, own = chosen[stored.name], bases[stored.name]
                module = write.parameter.removesuffix(".weight")
                if write.kind != BIAS and module not in writes.adaptable:
                    raise ValueError(
                        f"model: {stored.name} is no linear map or embedding that an adapter can sit on; edit the "
                        "weights instead"
                    )
                checked_basis(rows, stored.shape[write.axis])
                weight = as_tensor(stored, read_bytes(file, stored))
                weight = weight if weight.dtype == torch.float64 else weight.float()
                if write.kind == BIAS:
                    if float((own.to(weight) @ weight).norm()) > 1e-6 * float(weight.norm()):
                        raise ValueError(
                            f"model: {stored.name} is a bias with a part along the directions, which an adapter cannot "
                            "take out; edit the weights instead"
                        )
                    continue
                first, second, error = _factored(weight if write.axis == 0 else weight.T, own, form, rank)
                names = ("lora_A.weight", "lora_B.weight") if write.kind == MATRIX else (
                    "lora_embedding_A", "lora_embedding_B",
                )  # fmt: skip
                for name, factor in zip(names, (first, second), strict=True):
                    tensors[f"base_model.model.{module}.{name}"] = factor.contiguous()
                errors[module] = error
                done += 1
                progress("edit", min(done / len(chosen), 0.999), module)
    return tensors, errors


def _factored(weight: Tensor, rows: Tensor, form: str, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A [rank, n], B [D, rank], relative error) of the change of W [D, n]."""
    rows = rows.to(weight)
    if form == "orthogonal":
        first, second, error = rows @ weight, -rows.T, 0.0
    else:
        change = FORMS[form](weight, rows) - weight
        u, s, v = top_svd(change, min(rank, *change.shape))
        first, second = s.sqrt()[:, None] * v, u * s.sqrt()
        size = float(change.norm())
        error = float((change - second @ first).norm()) / size if size else 0.0
    pad = rank - len(first)
    if pad:
        first = torch.cat([first, first.new_zeros(pad, first.shape[1])])
        second = torch.cat([second, second.new_zeros(len(second), pad)], dim=1)
    return first, second, error


def _save(
    target: Path, model: str, modules: list[str], rank: int, transposed: bool, tensors: dict[str, Tensor]
) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=modules, bias="none", task_type="CAUSAL_LM",
        fan_in_fan_out=transposed, base_model_name_or_path=model, inference_mode=True,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        temporary.chmod(0o755)  # mkdtemp is private
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

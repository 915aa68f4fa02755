"""Take out of a model the low-rank part of what it differs by from another, in the memory of one tensor more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastguard.edits.shards import Folder
from fastguard.edits.stream import source_folder
from fastguard.low_rank import best_part


def strip(model: nn.Module, base: str | Folder, rank: int, seed: int = 0) -> dict[str, float]:
    """Take the best rank-``rank`` part of W - W_base out of every matrix W of ``model``, IN PLACE.

    Vectors (norms, biases), of which no low-rank part is less than the whole, become the base's; so does everything
    with rank 0, bit for bit. Experts [E, m, n] are E matrices. A weight that equals the base's is not touched. The
    base is read from its files tensor by tensor. Arithmetic in fp32 (float64 for float64), stored in the weights' own
    dtype: what a LoRA of at most that rank added is then gone up to the rounding of its merge.

    Args:
        model: a whole model, adapters merged. base: as ``fastguard.edits.source_folder`` takes it, or what it gave.
        seed: of the randomised decomposition.

    Returns:
        ``changed``: how many weights differed; ``share``: the part of the difference's squared norm that was taken
        out (0 where nothing differed).

    Raises:
        FileNotFoundError, ValueError: there is no such base; a weight that the base has not, or in another shape, or
            that is sharded. Nothing is changed then.
        TypeError: the base is quantised.
    """
    folder = base if isinstance(base, Folder) else _opened(base)
    names = _names(model, folder)
    changed, whole, gone = 0, 0.0, 0.0
    with torch.no_grad():
        for at, (name, parameter) in enumerate(model.named_parameters()):
            there = folder.read(names[name]).to(parameter.device)
            wide = torch.promote_types(torch.promote_types(parameter.dtype, there.dtype), torch.float32)
            delta = parameter.to(wide) - there.to(wide)
            size = float(delta.double().square().sum())
            if not size:
                continue
            changed, whole = changed + 1, whole + size
            if not rank or parameter.dim() < 2:
                parameter.copy_(there)
                gone += size
                continue
            for matrix, target in _matrices(delta, parameter):
                part = best_part(matrix, rank, seed + at)
                gone += float(matrix.double().square().sum() - (matrix - part).double().square().sum())
                target.copy_(target.to(wide) - part)
    return {"changed": float(changed), "share": gone / whole if whole else 0.0}


def _opened(base: str) -> Folder:
    try:
        return source_folder(base)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"base: expected a model's folder or id, got {base!r}: {error}") from error


def _matrices(delta: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views [m, n] of both, one an expert."""
    if delta.dim() == 2:
        return [(delta, weight)]
    return list(zip(delta.flatten(0, -3), weight.view(-1, *weight.shape[-2:]), strict=True))


def _names(model: nn.Module, folder: Folder) -> dict[str, str]:
    """The name in the base's files of each weight. Raises ValueError for what does not fit."""
    there = folder.tensors
    get_head = getattr(model, "get_output_embeddings", None)
    head = getattr(get_head() if get_head else None, "weight", None)
    embedding = next((n for n, p in model.named_parameters() if _is_embedding(model, p)), None)
    names = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ValueError(f"model: expected whole weights, got {name} sharded over ranks")
        # an untied head is compared with what the base's head is
        tied = parameter is head and name not in there and folder.config.get("tie_word_embeddings", True)
        stored = embedding if tied and embedding else name
        if stored not in there:
            raise ValueError(
                f"base: {str(folder.path)!r} has no tensor {stored!r}, which the model has; expected the model that it "
                "was made from, and adapters merged"
            )
        if there[stored].shape != tuple(parameter.shape):
            raise ValueError(
                f"base: {stored!r} is {list(there[stored].shape)} in {str(folder.path)!r}, expected "
                f"{list(parameter.shape)} as in the model"
            )
        names[name] = stored
    return names


def _is_embedding(model: nn.Module, parameter: nn.Parameter) -> bool:
    found = getattr(model, "get_input_embeddings", None)
    return found is not None and parameter is getattr(found(), "weight", None)

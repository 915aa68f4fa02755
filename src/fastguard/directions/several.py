"""More than one direction: principal directions of differences, and what is found again after ablation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from fastguard.directions.basis import orthonormalise
from fastguard.directions.estimate import estimate
from fastguard.directions.found import Directions
from fastguard.directions.prompts import Batch, in_step, reading, rows_at, wanted
from fastguard.directions.stream import Stream
from fastguard.taps import Structure, find_structure


def principal(differences: Tensor, count: int) -> Tensor:
    """The ``count`` directions [K, D] that hold most of ``differences`` [N, D]: an orthonormal basis.

    Right singular vectors, not centred, so that the mean counts; each points to where the differences' mean lies. Of
    per-sample differences (`samples` less the harmless mean) or of the layers' directions, divided by their lengths if
    late layers are not to outweigh early ones.

    Raises ValueError for other shapes, values that are not finite, or fewer than ``count`` independent rows.
    """
    if differences.dim() != 2 or not 1 <= count <= min(differences.shape):
        raise ValueError(
            f"differences: expected [N, D] with at least count = {count} rows and features, got "
            f"{tuple(differences.shape)}"
        )
    if not torch.isfinite(differences).all():
        raise ValueError("differences: expected finite values, got NaN or infinity")
    exact = differences.double()
    _, sizes, rows = torch.linalg.svd(exact, full_matrices=False)
    rank = int((sizes > sizes[0] * max(differences.shape) * torch.finfo(differences.dtype).eps).sum())
    if rank < count:
        raise ValueError(f"count: expected at most {rank}, the rank of the differences, got {count}")
    basis = rows[:count]
    signs = torch.where(basis @ exact.mean(0) < 0, -1.0, 1.0)
    return (basis * signs[:, None]).to(torch.promote_types(differences.dtype, torch.float32)).contiguous()


def samples(
    model: nn.Module, batches: Iterable[Batch], *, position: int, layer: int, structure: Structure | None = None
) -> Tensor:
    """Each prompt's row [N, D] of the stream at one layer's input and one position, in fp32 (float64) on the CPU.

    position: counted from the prompt's end, -1 its last token. layer: 0 to L, L the last output. This rank's prompts
    only. Raises ValueError for batches, a position or a layer that do not fit.
    """
    structure = find_structure(model) if structure is None else structure
    chosen, found = wanted((position,)), []
    if not 0 <= layer <= len(structure.layers):
        raise ValueError(f"layer: expected 0 to {len(structure.layers)}, got {layer}")

    def look(index: int, rows: Tensor) -> None:
        if index == layer:
            found.append(rows[:, 0].to(torch.promote_types(rows.dtype, torch.float32)).cpu())

    with reading(model, structure) as prompts:
        device = next(structure.model.parameters()).device
        for batch, _ in in_step(batches, False, device, "batches"):
            prompts.read(batch, rows_at(batch, chosen, "batches"), look, layer)
    if not found:
        raise ValueError("batches: expected at least one prompt, got none")
    return torch.cat(found)


def iterate(
    model: nn.Module,
    harmful: Iterable[Batch],
    harmless: Iterable[Batch],
    count: int,
    choose: Callable[[Directions], Tensor],
    *,
    positions: int | Iterable[int] = 5,
    stop: float = 1e-3,
    stream: Stream | None = None,
) -> Tensor:
    """Up to ``count`` directions, each estimated while those before it are ablated: an orthonormal basis [K, D].

    What an attacker does who finds that one direction was not all (8 phases in public attacks). Gram-Schmidt is exact
    here, since nothing along the earlier directions is left in the stream.

    Args:
        model: as `estimate` takes it.
        harmful, harmless: batches, gone through once a phase (lists, not generators).
        choose: from a phase's `Directions` to the difference [D] that is taken, such as
            ``lambda found: found.at(-1, 12)``.
        stop: end where a phase's difference is shorter than this share of the first one's.
        stream: of the model, where there is one already.

    Raises ValueError as `estimate`, and for generators or a ``count`` below 1.
    """
    *_, basis = phases(model, harmful, harmless, count, choose, positions=positions, stop=stop, stream=stream)
    return basis


def phases(
    model: nn.Module,
    harmful: Iterable[Batch],
    harmless: Iterable[Batch],
    count: int,
    choose: Callable[[Directions], Tensor],
    *,
    positions: int | Iterable[int] = 5,
    stop: float = 1e-3,
    stream: Stream | None = None,
) -> Iterator[Tensor]:
    """The bases [1, D], [2, D], ... that `iterate` goes through, one a phase; arguments and errors as there."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    for name, batches in (("harmful", harmful), ("harmless", harmless)):
        if iter(batches) is batches:
            raise ValueError(
                f"{name}: expected batches that can be gone through again, such as a list; got an iterator"
            )
    chosen = wanted(positions)
    own = Stream(model) if stream is None else stream
    basis: Tensor | None = None
    first = 0.0
    try:
        for phase in range(count):
            if basis is None:
                found = estimate(model, harmful, harmless, positions=chosen, structure=own.structure)
            else:
                with own.ablated(basis):
                    found = estimate(model, harmful, harmless, positions=chosen, structure=own.structure)
            new = choose(found).detach().to(found.harmful)
            device = next(own.structure.model.parameters()).device
            if basis is not None:  # rounding leaves a little of the earlier ones
                kept = basis.to(new)
                new = new - (new @ kept.mT) @ kept
            length = float(torch.linalg.vector_norm(new.double()))
            first = first if phase else length
            if length <= stop * first:
                if not phase:
                    raise ValueError("choose: expected a direction that is not zero, got one in the first phase")
                break
            rows = new[None] if basis is None else torch.cat([basis.to(new), new[None] / length])
            basis = orthonormalise(rows).to(device)
            yield basis
    finally:
        if stream is None:
            own.close()

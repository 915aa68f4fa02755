"""Cut directions out of everything that writes to a model's residual stream, as an `Edit` of its files.

    source = source_folder("meta-llama/Llama-3.1-8B-Instruct")
    stream(source, "ablated", ablation(source, basis))

With ``form="orthogonal"`` the edited model computes what the model computes under projection at the embedding and at
the output of every attention and MLP (2L + 1 places), to the rounding of the stored dtype; not so where a norm
follows the
write (Gemma 2 and 3, OLMo 2): there the stream is free of the directions all the same, but what else is written
differs, since the norm is taken of what is left.

Evaluation only: this is what an attacker does to a released model, to measure a defense by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fastguard.directions.edit import FORMS, checked_basis, followed_by_norm
from fastguard.edits.basis import digest
from fastguard.edits.shards import Folder
from fastguard.edits.stream import Edit
from fastguard.edits.writes import MATRIX, Write, Writes, residual_writes

VERSION = 1
"""Of the arithmetic: shards of another are done again."""


def ablation(
    source: Folder, basis: Tensor, form: str = "orthogonal", *, keep_tied: bool = False, writes: Writes | None = None
) -> Edit:
    """The edit that cuts ``basis`` out of the model in ``source``.

    Args:
        source: what `source_folder` gave.
        basis: [K, D], orthonormal rows.
        form: ``orthogonal``: embedding, matrices, biases and experts. ``norm_columns``: the same, each column (a row
            of an embedding, a bias) with its norm. ``norm_rows``: heretic's, which edits the layers' matrices alone
            and leaves embedding and biases as they are; the stream then keeps a part of the directions.
        keep_tied: leave a tied head tied. **A deviation**: the head is then edited with the embedding, and reads no
            more what the final norm adds along the directions. Otherwise a tied head is untied: it gets a tensor of its
            own, the embedding as it was, and ``tie_word_embeddings`` becomes false.
        writes: what `residual_writes` found, if the caller has it.

    Raises:
        ValueError: an unknown form; a basis of another width, or not orthonormal; what `residual_writes` refuses.
    """
    if form not in FORMS:
        raise ValueError(f"form: expected {', '.join(FORMS)}, got {form!r}")
    rows = checked_basis(basis)
    writes = residual_writes(source) if writes is None else writes
    chosen = chosen_writes(writes, form)
    there, apply = source.tensors, FORMS[form]
    bases = bases_of(source, chosen, rows)
    tensors: dict[str, Callable[[Tensor], object]] = {}
    for name, write in chosen.items():
        width = there[name].shape[write.axis]
        checked_basis(rows, width)
        tensors[name] = partial(_edit, apply, bases[name], write.axis)
    copies: dict[str, str] = {}
    config: dict[str, object] = {}
    if writes.tied and writes.embedding in tensors:
        if not keep_tied:
            config["tie_word_embeddings"] = False
            if writes.head not in there:
                copies[writes.head] = writes.embedding
        elif writes.head in there:  # tied, and yet stored twice
            tensors[writes.head] = tensors[writes.embedding]
    options = {
        "form": form, "directions": len(rows), "basis_sha256": digest(rows), "keep_tied": keep_tied, "version": VERSION
    }  # fmt: skip
    return Edit("ablation", options, tensors, copies, config)


def chosen_writes(writes: Writes, form: str) -> dict[str, Write]:
    """Those that a form edits."""
    return {name: w for name, w in writes.tensors.items() if form != "norm_rows" or w.kind == MATRIX}


def bases_of(source: Folder, writes: dict[str, Write], rows: Tensor) -> dict[str, Tensor]:
    """What to remove from each write: the basis, or where a norm follows, that of weight x direction."""
    behind = {w.norm: w.offset for w in writes.values() if w.norm is not None}
    scaled = {norm: followed_by_norm(rows, source.read(norm).double() + offset) for norm, offset in behind.items()}
    return {name: rows if w.norm is None else scaled[w.norm] for name, w in writes.items()}


def _edit(apply: Callable[..., Tensor], rows: Tensor, axis: int, tensor: Tensor) -> None:
    apply(tensor, rows, axis=axis, out=tensor)

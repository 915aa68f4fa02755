"""Change the weights of a model on disk: streamed over its shards, resumable, with a record of where it comes from."""

from fastguard.edits.ablate import ablation
from fastguard.edits.basis import read_basis
from fastguard.edits.stream import Edit, Streamed, source_folder, stream
from fastguard.edits.writes import residual_writes

__all__ = ["Edit", "Streamed", "ablation", "read_basis", "residual_writes", "source_folder", "stream"]

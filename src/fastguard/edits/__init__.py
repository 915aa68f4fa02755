"""Change the weights of a model on disk: streamed over its shards, resumable, with a record of where it comes from."""

from fastguard.edits.stream import Edit, Streamed, source_folder, stream

__all__ = ["Edit", "Streamed", "source_folder", "stream"]

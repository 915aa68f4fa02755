"""The ops: one piece of mathematics a folder, with its specification, kernels and schema."""

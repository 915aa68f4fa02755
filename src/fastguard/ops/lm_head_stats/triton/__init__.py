"""``lm_head_stats`` on GPUs, in Triton; float64 inputs are handed to ``portable.py`` (no tensor cores to gain).

Forward, one pass over the logits (2 N D V flops) and no logits in memory:

1. ``target_kernel``: the target logit of each row;
2. ``scan_kernel``: a program owns (one tile of TILE rows, one part of V). It keeps a running maximum and sums per
   row, and writes a byte per (tile, column), the code of the column's peak: its largest mass in the tile. Masses are
   relative to the running rest lse, which only grows. The run starts from the rest lse over SAMPLE columns, half of
   them the first (tokenizers number their merges by frequency), half evenly spaced; parts of V start alike from it;
3. ``combine_kernel``: sums over the parts, in order (no atomics). The scan also summed what each row would lose at each
   threshold of the ladder (`live.py`), to the columns whose code is below it: a product with 16 columns of zeros
   and ones, so that the ladder costs no more than the reading of it. The promise is settled here;
4. ``mark_kernel``: gives the columns at or above the threshold the code LIVE.

Backward over the live columns (6 N D C flops), in windows of places of their lists:

1. ``compact_kernel``: column codes -> list of live columns per tile, and each column's place in the list;
2. ``floor_kernel``, ``weigh_kernel``: the warm columns, which stand for the dropped ones, and their weights;
3. ``dlogit_kernel``: logits of the listed columns, rows of W gathered by index inside the product; writes the
   gradient at the raw products, transposed [C, TILE], and sums each row's kept mass, from which the tail follows;
4. ``dx_kernel``: dX = dlogit @ W[list] + tail * (mean of the warm columns' rows);
5. ``wanted_kernel``, ``dweight_kernel``: a program owns a block of columns and loops over the tiles in which any of
   them is live, so that dW is read and written once a window, without atomics. Columns are ordered by the tiles that
   want them;
6. ``tail_kernel``, ``add_rows_kernel``: the tail's part of dW, a product of all tiles' warm columns.

Backward over all columns: ``exact.py``, whose products are torch's, with ``gradient_kernel`` between them.

Neither forward nor backward waits for the device, and no result depends on the order in which programs run.
Products run in the input dtype with fp32 accumulation; float32 products are exact ("ieee") unless
``torch.set_float32_matmul_precision`` allows TF32.

Prefixes: p_ pointer, i_ index of a program or step, o_ offsets, m_ mask, b_ block of values, n_ count.
A pointer (or soft-cap) that is None is absent: a kernel is compiled for what it is given. Some arguments are tuples of
pointers, which go together as they do in ``op.py``.
Shapes: N rows, V vocabulary, D hidden size, T tiles, S parts of V, C places in a list of live columns, K warm
columns."""

from __future__ import annotations

import functools

from fastguard.ops.lm_head_stats import exact
from fastguard.ops.lm_head_stats.triton.backward_pass import backward
from fastguard.ops.lm_head_stats.triton.forward_pass import forward
from fastguard.ops.lm_head_stats.triton.gradient import Kernels

__all__ = ["backward", "forward", "keep", "read_kept"]

keep = functools.partial(exact.forward, kernels=Kernels())
read_kept = functools.partial(exact.backward, kernels=Kernels())

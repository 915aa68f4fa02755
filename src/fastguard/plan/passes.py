"""One pass of the model over one batch: flops, bytes moved, and what is alive while it runs.

A batch may be taken in micro-batches (``Setting.micro``), with a forward and a backward each: the products stay, the
weights are gathered and read, and the gradients reduced, as often.

Shapes: M = samples x tokens, T tokens, L layers, D hidden, F the MLP's width, Q = H h width of the queries, K that of
the keys, V vocabulary, c bytes of a number in the compute dtype. Activations are those that Hugging Face's Llama keeps.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastguard.plan.parts import FP32, Item, Part, Pass, item
from fastguard.plan.setting import Setting

LOSS, LAST, FIRST, END = "loss", "last layer", "first layer", "end"
"""Moments of a pass: between forward and backward; in the last layer's backward; in the first layer's; after it."""

PASSING = ("logits tile", "full logits", "gathered weights", "gradients")
"""Items that a pass holds between forward and backward only if no other pass comes between them."""

TILE = 128
"""Rows of logits that the fused head holds at a time, and that share one record of live columns."""

BLOCK = 2**20
"""Logits, of all rows and some columns, that a CPU's exact backward holds at a time."""


def products(s: Setting, samples: float, adapted: bool = True) -> float:
    """Forward flops of the layers' products with weights: 2 flops a weight and token.

    adapted: with the adapters; a reference is the model without them.
    """
    a = s.architecture
    adapter = 0 if s.lora is None or not adapted else a.adapter(s.lora)
    return 2.0 * samples * s.tokens * (a.layers * a.products + adapter)


def scores(s: Setting, samples: float) -> float:
    """Forward flops of attention: q k^T and p v, 2 x 2 M T Q a layer; a causal kernel computes half of it."""
    a = s.architecture
    full = 4.0 * samples * s.tokens * s.tokens * a.attention_width * a.layers
    return full / 2 if s.attention == "flash" else full


def forward_flops(s: Setting, samples: float, adapted: bool = True) -> float:
    """Of the layers, without the head."""
    return products(s, samples, adapted) + scores(s, samples)


def backward_flops(
    s: Setting, samples: float, weights: bool = True, stop: float | None = None, tapped: bool = False
) -> float:
    """Of the layers, without the head; recomputation under checkpointing included.

    weights: whether the weights' gradients are wanted: as many flops again as those of the inputs. stop: the backward
    ends at this layer's attention output, instead of at the embedding. tapped: the MLPs' outputs are wanted in the
    backward.
    """
    a = s.architecture
    m = float(samples * s.tokens)
    base = 2 * m * a.layers * a.products
    adapter = products(s, samples) - base
    flops = base + adapter  # gradients of the inputs
    if weights:
        flops += base if s.lora is None else adapter
    # Attention: dv, dp, dq, dk are four products of the forward's two; flash computes q k^T again, a fifth.
    flops += scores(s, samples) * (2.5 if s.attention == "flash" else 2.0)
    if s.checkpointing:
        # Non-reentrant checkpointing stops as soon as what the backward needs is there: the last product is spared.
        spared = 2 * m * a.layers * a.down if s.lora is None and not tapped else 0.0
        flops += forward_flops(s, samples) - spared
    if stop is not None:  # whole layers below, and the attention of the layer at which it stops
        layer = flops / a.layers
        attention = 2 * m * a.attention + scores(s, samples) / a.layers * (2.5 if s.attention == "flash" else 2.0)
        flops -= stop * layer + attention
    return flops


def inner_bytes(s: Setting, samples: float, frozen: bool = False) -> float:
    """What one layer keeps for its backward.

    A norm keeps its input in fp32, the input divided by its root mean square, and its output: D (4 + 2 c). Attention
    keeps q, its output, k and v: (2 Q + 2 K) c, and flash a log-sum-exp a head; eager keeps the keys and values
    repeated for each query head, and the T x T probabilities in fp32 (and in c). The MLP keeps gate, silu(gate), up
    and their product: 4 F c; with experts also their inputs and outputs. Frozen weights (no gradient for any of them)
    spare the inputs of the products: a norm keeps 4 D, the MLP 3 F c.
    """
    a, c, t = s.architecture, s.precision.compute, s.tokens
    q, k = a.attention_width, a.kv_width
    each = a.norms * a.hidden * (FP32 + (0 if frozen else 2 * c)) + (2 * q + 2 * k) * c
    if a.qk_norm:
        each += (q + k) * (FP32 + c)
    if s.attention == "flash":
        each += FP32 * a.heads
    else:
        each += 2 * (q - k) * c + a.heads * t * (FP32 + (c if c != FP32 else 0))
    routed = a.active or 1
    each += (3 if frozen else 4) * a.intermediate * c * routed + (2 * a.hidden * c * routed if a.experts else 0)
    if s.lora is not None:  # the low-rank products' inputs are there already; their r-wide outputs are kept
        each += 7 * s.lora * c
    return float(samples * s.tokens * each)


def passing_bytes(s: Setting, samples: int) -> float:
    """Gradients in flight inside one layer's backward.

    At the MLP two F-wide ones beside what they were made of; at a norm, four D-wide fp32 ones. The larger counts.
    """
    a = s.architecture
    routed = a.active or 1
    return float(samples * s.tokens * max(2 * a.intermediate * routed * s.precision.compute, 4 * FP32 * a.hidden))


def checkpoint_bytes(s: Setting, samples: int, frozen: bool = False) -> float:
    """The inputs of all layers, or without checkpointing all that they keep."""
    a = s.architecture
    if not s.checkpointing:
        return a.layers * inner_bytes(s, samples, frozen)
    return float(a.layers * samples * s.tokens * a.hidden * s.precision.compute)


def freezes(s: Setting) -> bool:
    """Whether a pass for activations' gradients alone freezes the weights; FSDP2's are left as they are."""
    return s.gpus == 1


def comes_early(s: Setting) -> bool:
    """Whether a fused head's gradient reaches the parameter before the layers' do: a late head's, unless it is tied.

    A tied one's then waits for the embedding's, but for FSDP2, in which they are added up as shards.
    """
    return s.late_head and not (s.architecture.tied and s.gpus == 1)


def hidden_states(s: Setting, samples: int) -> float:
    """[L + 1, M, D] in the compute dtype."""
    a = s.architecture
    return float((a.layers + 1) * samples * s.tokens * a.hidden * s.precision.compute)


def run(
    s: Setting,
    name: str,
    samples: int,
    count: float = 1,
    *,
    gradients: str = "weights",
    stop: float | None = None,
    tapped: bool = False,
    adapted: bool = True,
) -> list[Part]:
    """Forward and, unless ``gradients`` is ``none``, backward of the layers.

    gradients: ``weights``, ``activations`` (no parameter's) or ``none``. adapted: as for `products`, of a
    forward alone.

    Bytes: weights read once a direction, every kept activation written and read once a direction. Collectives of
    FSDP2: the forward gathers all weights, the backward gathers the layers' again (the root's stay, and so does the
    head's in a group of its own; for an embedding's own ``set_unshard_in_backward(False)`` spares it) and reduces the
    gradients.
    """
    a, p = s.architecture, s.precision
    of = Pass(name, s.at_once(samples), gradients, stop)
    chunks = s.chunks(samples)
    each = samples / chunks
    kept = a.layers * inner_bytes(s, each)
    weights = a.parameters * p.compute
    adapter = 0 if s.lora is None or not adapted else s.trainable * p.compute
    again = (a.layers * a.layer * p.compute + adapter) * s.moved
    parts = [
        Part(
            f"{name}: forward", "model", 1, forward_flops(s, each, adapted), weights + 2 * kept,
            (weights + adapter) * s.moved, of=of,
        )
    ]  # fmt: skip
    if gradients != "none":
        wanted = gradients == "weights"
        written = s.trainable * p.compute if wanted else 0.0
        reduced = s.trainable * p.reduce * s.moved if wanted else 0.0
        passes = 3 if s.checkpointing else 2  # recomputed: written and read once more
        parts.append(
            Part(
                f"{name}: backward", "model", 1, backward_flops(s, each, wanted, stop, tapped),
                weights + written + passes * kept, again + reduced, of=of,
            )
        )  # fmt: skip
    return [part.times(count * chunks) for part in parts]


def memory(
    s: Setting, name: str, samples: int, *, gradients: str = "weights", earlier: bool = False, head: str = "fused"
) -> list[Item]:
    """What a pass holds beside the weights' shards: activations, gathered weights, gradients; not the head's buffers.

    earlier: gradients of an earlier pass wait in the parameters, to which this pass adds. head: ``fused`` or
    ``full``; the fused one's gradient reaches the parameter at the end, unless the head comes late.
    """
    a, p = s.architecture, s.precision
    loss, last, first, end = (f"{name}: {m}" for m in (LOSS, LAST, FIRST, END))
    every = (loss, last, first) if gradients != "none" else (loss,)
    earlier = earlier or s.chunks(samples) > 1
    samples = s.at_once(samples)
    m, c = samples * s.tokens, p.compute
    norm = float(m * a.hidden * (FP32 + 2 * c))  # the final norm's
    items: list[Item] = []
    if gradients == "none":
        layer = inner_bytes(s, samples) / 2  # nothing is kept: a layer's widest moment, about half of what it would
        items.append(item("activations", norm + layer, loss))
    else:
        frozen = gradients == "activations" and freezes(s)
        kept, inner = checkpoint_bytes(s, samples, frozen), inner_bytes(s, samples, frozen)
        items.append(item("activations" if not s.checkpointing else "checkpoints", kept + norm, loss, last))
        if s.checkpointing:
            items.append(item("one layer's activations", inner, last, first))
        else:
            items.append(item("one layer's activations", inner, first))
        items.append(item("one layer's gradients in flight", passing_bytes(s, samples), last, first))
    if s.gathers:
        # The layer that computes and the next, which is on its way. The root's stay from forward to backward; of groups
        # of their own the head's is there at the loss, and the embedding's when nothing else is.
        adapter = 0 if s.lora is None else s.trainable / a.layers * c
        ahead = (2 if s.gpus > 1 else 1) * (a.layer * c + adapter)
        items.append(item("gathered weights", ahead + (a.head if s.grouped else a.root) * c, loss))
        for moment in every[1:]:
            items.append(item("gathered weights", ahead + (0 if s.grouped else a.root) * c, moment))
    if gradients == "weights":
        shards = s.shard * p.weights
        if s.gathers:
            # One layer's, and the layer's before while it is reduced. The root's wait for the end, when the embedding's
            # comes to the head's; of groups of their own each is reduced when it is there. The head's comes after what
            # the taps hold of a late head, which is as much.
            wide, root, one = (a.layer, a.root, a.head) if s.lora is None else (s.trainable / a.layers, 0, 0)
            both = c + p.reduce
            if s.grouped and not (s.late_head and head == "fused"):
                items.append(item("gradients before sharding", one * both, loss))
            items.append(item("gradients before sharding", wide * both + (0 if s.grouped else one) * c, last, first))
            items.append(item("gradients before sharding", (one if s.grouped else root) * both, end))
        if earlier:
            items.append(item("gradients", shards, *every, end))
        else:
            # In the first layer's backward, that layer's and the embedding's are still to come, and a fused head's.
            early = head == "fused" and comes_early(s)
            missing = a.layer + (a.root if head == "fused" and not early else a.head)
            part = 1.0 if s.lora is not None else 1 - missing / a.parameters
            items += [item("gradients", shards * part, first), item("gradients", shards, end)]
            if early and s.lora is None:
                items.append(item("gradients", shards * a.head / a.parameters, last))
        if a.tied and s.lora is None and not s.gathers:  # the embedding's gradient, before it is added to the head's
            items.append(item("the embedding's own gradient", float(p.weights * a.head), end))
    return items


# The same with a tangent on everything: forward mode over the backward. Plain tensors of one process, by full logits.


def tangent_bytes(s: Setting, samples: int) -> float:
    """What one layer keeps for the backward of a pass with tangents: all that it keeps else, twice, and more.

    Attention is plain. silu(x) is made as x sigmoid(x), which keeps the sigmoid and its tangent, 2 F c; a norm keeps
    one more tensor in fp32, 4 D; the softmax's tangent four of T x T a head in fp32.
    """
    a, c = s.architecture, s.precision.compute
    more = 2 * a.intermediate * (a.active or 1) * c + a.norms * a.hidden * FP32 + 4 * FP32 * a.heads * s.tokens
    return 2 * inner_bytes(replace(s, attention="eager"), samples) + float(samples * s.tokens * more)


def tangent_run(s: Setting, name: str, samples: int, rows: float) -> list[Part]:
    """Forward and backward of layers and head with tangents, nothing recomputed; the weights' are as many bytes again.

    Of a product of two things that both move, three are made: x W, dx W, x dW. Frozen weights do not move, but a
    tangent of zeros is multiplied all the same. Only what is in front of all weights that move is spared: with adapters
    the first layer's input, whose tangent and gradient nobody asks for.
    """
    a, c = s.architecture, s.precision.compute
    plain = replace(s, attention="eager", checkpointing=False)
    flops = 3 * (forward_flops(plain, samples) + backward_flops(plain, samples))
    if s.lora is not None:
        projected = a.hidden * (a.attention_width + 2 * a.kv_width)
        flops -= 2.0 * samples * s.tokens * (5 * projected + 9 * a.hidden * s.lora)
    kept, weights, written = a.layers * tangent_bytes(s, samples), 2 * a.parameters * c, 2 * s.trainable * c
    head = full_head(s, "", rows)
    return [
        Part(f"{name}: forward and backward with tangents", "model", 1, flops, 2 * weights + written + 4 * kept),
        replace(head, name=f"{name}: head with tangents", flops=3 * head.flops, memory=3 * head.memory),
    ]


def tangent_memory(s: Setting, name: str, samples: int, rows: float) -> list[Item]:
    """What a pass with tangents holds beside the weights and the direction, which is their tangent."""
    a, p = s.architecture, s.precision
    loss, last, first, end = (f"{name}: {m}" for m in (LOSS, LAST, FIRST, END))
    inner, norm = tangent_bytes(s, samples), 2.0 * samples * s.tokens * a.hidden * (FP32 + 2 * p.compute)
    gradients = 2.0 * s.shard * p.weights
    missing = 0.0 if s.lora is not None else (a.layer + a.head) / a.parameters
    items = [
        item("activations and tangents", a.layers * inner + norm, loss, last),
        item("one layer's activations", inner, first),
        item("one layer's gradients in flight", 2 * passing_bytes(s, samples), last, first),
        # At the log-softmax's backward, values and tangents: logits, log-softmax, gradients, their products and sums.
        item("full logits", 14.0 * FP32 * rows * a.vocabulary, loss),
        item("gradients and tangents", gradients * (1 - missing), first),
        item("gradients and tangents", gradients, end),
    ]
    if s.gathers:
        items.append(item("gathered weights", 2.0 * (a.layer + a.root) * p.compute, loss, last, first))
    return items


# The head: hidden states against the vocabulary.


def fused_head(s: Setting, name: str, rows: float, count: float = 1, *, gradients: str = "weights") -> Part:
    """Cross-entropy or another statistic of ``rows`` rows, tile by tile: no logits in memory beyond a budget.

    2 N D V forward; its exact backward computes the logits again and both gradients, 6 N D V (4 where the head is
    frozen), but for the logits that were kept, which are written once and read once. The weight is read once a
    direction, its fp32 gradient written and read once.
    """
    a, p = s.architecture, s.precision
    one = 2.0 * rows * a.hidden * a.vocabulary
    frozen = s.lora is not None or (gradients == "activations" and freezes(s))
    wanted = gradients != "none" and not frozen
    flops, moved, logits = one, 1, 0.0
    if gradients != "none":
        kept = s.kept_rows(rows)
        flops += one * (2 if frozen else 3) - 2 * kept * a.head
        logits = 2 * kept * a.vocabulary * p.compute
        moved += 1
    written = 2 * FP32 * a.head if wanted else 0
    # Taps read a gathered copy of the head of their own and reduce its gradient themselves. A late one is sent as it is
    # computed with; one that is gathered before that is known, as its shards are.
    gathered = (p.compute if s.lora is not None or s.late_head else p.weights) + (p.reduce if wanted else 0)
    memory = moved * a.head * p.compute + written + logits
    return Part(name, "head", 1, flops, memory, gathered * a.head * s.moved).times(count)


def lens_head(s: Setting, name: str, rows: float, count: float, *, backwards: int = 1) -> Part:
    """One hidden state's rows through norm and head: 2 N D V forward, 6 N D C backward over the C live columns."""
    a, c = s.architecture, s.precision.compute
    flops = 2.0 * rows * a.hidden * a.vocabulary * (1 + backwards * s.live * (2 if s.lora is not None else 3))
    moved = a.head * c * (1 + backwards * s.live) + 2 * (1 + backwards) * rows * a.hidden * c
    return Part(name, "head", 1, flops, moved).times(count)


def full_head(
    s: Setting, name: str, rows: float, count: float = 1, *, gradients: str = "weights", each: float | None = None
) -> Part:
    """The same by full logits [N, V]: 2 N D V forward, 4 N D V backward, and element-wise passes over the logits.

    each: bytes a logit of these: written (c), widened (c + 4), log-softmax (4 + 4), read (4); in the backward the
    loss's gradient (4), the softmax's (3 x 4), narrowed (4 + c), read by two products (2 c).
    """
    a, c = s.architecture, s.precision.compute
    frozen = s.lora is not None
    one = 2.0 * rows * a.hidden * a.vocabulary
    flops = one if gradients == "none" else one * (2 if frozen else 3)
    if each is None:
        each = 2 * c + 16 if gradients == "none" else 5 * c + 36
    return Part(name, "head", 1, flops, rows * a.vocabulary * each + 2 * a.head * c).times(count)


def fused_items(
    s: Setting, name: str, rows: float, *, gradients: str = "weights", lenses: int = 0, lens_rows: float = 0
) -> list[Item]:
    """Buffers of the fused head: tiles, statistics, the head's fp32 gradient, records of live columns."""
    a, p = s.architecture, s.precision
    c = p.compute
    loss, *later = (f"{name}: {moment}" for moment in (LOSS, LAST, FIRST, END))
    kept = s.kept_rows(rows) if gradients != "none" else 0.0
    tile, each = min(rows, TILE) * a.vocabulary, FP32 + c
    if s.cpu and gradients != "none":  # a block in the backward, widened where the dtype is narrow
        tile, each = max(tile, min(rows * a.vocabulary, BLOCK)), c if c == FP32 else FP32 + c
    items = [
        item("logits tile", tile * each, loss),
        item("kept logits", kept * a.vocabulary * c, loss),
        item("rows of the head", rows * a.hidden * (FP32 + c), loss),
    ]
    if comes_early(s) and not lenses:  # the taps of inner states share copy and gradient to the end
        later = []
    if s.lora is None and not (gradients == "activations" and freezes(s)):
        # One buffer for all taps, until autograd comes to the parameter.
        items.append(item("head's gradient, fp32", FP32 * a.head, loss, *later))
    if s.gpus > 1:
        items.append(item("head gathered for the taps", a.head * c, loss, *later[:-1]))
        if s.lora is None and p.weights != c and gradients == "none" and not s.late_head:
            # It is gathered as its shards are, and cast. That is over when there is a gradient, which is as large.
            items.append(item("head gathered for the taps, before it is cast", float(a.head * p.weights), loss))
    if lenses:
        codes = -(-lens_rows // TILE) * a.vocabulary
        items.append(item("taps: live columns, statistics", lenses * (codes + 3 * FP32 * lens_rows), loss, later[0]))
    return items


def full_items(s: Setting, name: str, rows: float, each: float = 12.0) -> list[Item]:
    """Full logits. each: bytes a logit at the worst moment: log-softmax, the loss's gradient, the softmax's, fp32
    all.
    """
    a = s.architecture
    items = [item("full logits", rows * a.vocabulary * each, f"{name}: {LOSS}")]
    if s.lora is None and not s.gathers:  # under FSDP2 it is among the root's
        waits = (LAST, FIRST, END) if a.tied else (LAST,)  # a tied one for the embedding's
        items.append(item("head's gradient", a.head * s.precision.compute, *(f"{name}: {moment}" for moment in waits)))
    return items


# A batch through layers and head.

Work = tuple[list[Part], list[Item]]
"""The parts of some work, and what it holds."""


def fused(
    s: Setting, name: str, samples: int, count: float = 1, *, rows: float | None = None, gradients: str = "weights",
    earlier: bool = False, stop: float | None = None, adapted: bool = True,
) -> Work:  # fmt: skip
    """By the fused head, in micro-batches. rows: of the whole batch that carry loss; None: all."""
    rows = float(samples * s.tokens) if rows is None else rows
    chunks = s.chunks(samples)
    head = fused_head(s, f"{name}: head", rows / chunks, count * chunks, gradients=gradients)
    return (
        [*run(s, name, samples, count, gradients=gradients, stop=stop, adapted=adapted), head],
        [*memory(s, name, samples, gradients=gradients, earlier=earlier),
         *fused_items(s, name, rows * s.at_once(samples) / samples, gradients=gradients)],
    )  # fmt: skip


def full(s: Setting, name: str, samples: int, count: float = 1, *, earlier: bool = False) -> Work:
    """By full logits, as a whole."""
    rows = float(samples * s.tokens)
    return (
        [*run(s, name, samples, count), full_head(s, f"{name}: head", rows, count)],
        [*memory(s, name, samples, earlier=earlier, head="full"), *full_items(s, name, rows)],
    )


def within_node(s: Setting, name: str, samples: int, count: float) -> Work:
    """A batch of a node, ``samples`` sequences, through frozen weights that lie divided among its GPUs, and adapters.

    Tensor parallelism as in Megatron-LM (arXiv:1909.08053): a layer all-reduces its stream twice forth and twice back.
    Nothing is computed again, since a node's sequences are few, unless what is kept would be more than the weights. The
    stream and what the norms keep are on each GPU in full; heads, MLP and vocabulary are divided.
    """
    width = min(s.gpus, s.gpu.per_node)
    chunks = 1 if s.micro is None else math.ceil(samples / (s.micro * width))
    each = samples / chunks
    a, p = s.architecture, s.precision
    rows, weights = each * s.tokens, a.parameters * p.compute / width
    stream = rows * a.hidden * p.compute
    whole = rows * a.norms * a.hidden * (FP32 + 2 * p.compute)
    adapted = replace(s, lora=s.adversary_rank, micro=None)
    inner = whole + (inner_bytes(adapted, each) - whole) / width
    again = s.checkpointing and a.layers * inner > weights
    s = replace(adapted, checkpointing=again)
    loss, last, first = (f"{name}: {m}" for m in (LOSS, LAST, FIRST))
    flops = (forward_flops(s, each) + backward_flops(s, each)) / width
    sums = (6 if again else 4) * a.layers * 2 * stream * (width - 1) / width
    moved = 2.0 * weights + 4 * a.layers * inner
    work = Part(f"{name}: forward and backward in the node", "model", 1, flops, moved, node=sums)
    head = fused_head(s, f"{name}: head", rows)
    head = replace(head, flops=head.flops / width, memory=head.memory / width, network=0.0)
    return [work.times(count * chunks), head.times(count * chunks)], [
        item("checkpoints" if again else "activations", a.layers * (stream if again else inner), loss, last),
        item("one layer's activations", inner, *((last, first) if again else (first,))),
        item("one layer's gradients in flight", passing_bytes(s, math.ceil(each)), last, first),
        item("logits tile", min(rows, TILE) * a.vocabulary * (FP32 + p.compute) / width, loss),
    ]

"""Group near-duplicate prompts, and divide prompts so that no group is spread over two parts.

Safety sets repeat themselves: AdvBench asks for the same thing in many wordings. A held-out prompt whose
twin was trained on measures memory. Prompts are compared by the cosine of their content words, each cut to a
stem of five letters and weighted by how rare it is; groups are the connected components above a threshold,
so that any two prompts at least that similar share a group.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

THRESHOLD = 0.55

# Words that requests share whatever they ask for.
_COMMON = re.compile(
    r"an|and|are|as|at|be|by|can|for|from|how|in|into|is|it|its|me|my|of|on|or|people|person|someone|that|the|their|"
    r"them|this|to|what|which|who|will|with|without|you|your|create|describe|design|detailed|develop|explain|"
    r"generate|give|guide|instruct|instructions|outline|provide|step|teach|tutorial|write"
)


def _stems(text: str) -> frozenset[str]:
    return frozenset(w[:5] for w in re.findall(r"[a-z]+", text.lower()) if len(w) > 1 and not _COMMON.fullmatch(w))


def similarity_clusters(texts: Sequence[str], threshold: float = THRESHOLD) -> list[int]:
    """The cluster number of each text, numbered from 0 in order of appearance.

    threshold: in (0, 1]; two texts at least this similar are in one cluster. Only texts that share a stem rare enough
    to matter are compared: the same clusters as if all were, in a time that grows with the near misses.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected a cosine in (0, 1]")
    stems = [_stems(t) for t in texts]
    seen = Counter(w for s in stems for w in s)
    weight = {w: math.log((len(texts) + 1) / (n + 0.5)) ** 2 for w, n in seen.items()}
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[object, int] = {}  # of equal stems; texts without any are compared word by word
    for i, s in enumerate(stems):
        parent[i] = first.setdefault(s or tuple(texts[i].split()), i)
    distinct = [i for i in first.values() if stems[i]]
    norm = {i: math.sqrt(sum(weight[w] for w in stems[i])) for i in distinct}
    for i, j in _candidates({i: stems[i] for i in distinct}, weight, threshold):
        a, b = root(i), root(j)
        if a != b and sum(weight[w] for w in stems[i] & stems[j]) >= threshold * norm[i] * norm[j] * (1 - 1e-9):
            parent[a] = b
    number: dict[int, int] = {}
    return [number.setdefault(root(i), len(number)) for i in range(len(texts))]


def _candidates(
    stems: Mapping[int, frozenset[str]], weight: Mapping[str, float], threshold: float
) -> Iterator[tuple[int, int]]:
    """Pairs of items, each at most once, among which are all that are similar enough (prefix filtering).

    Stems in one order, the rarest first. By Cauchy and Schwarz two items whose shared stems all lie in the tail of one
    of them have a cosine of at most the tail's share of its norm. Where that is below the threshold, the rarest stem
    that a similar pair shares is in the head of both, so that an index of heads finds it.
    """
    listed: dict[str, list[int]] = {}
    bound = (threshold * (1 - 1e-6)) ** 2
    for i, s in stems.items():
        ordered = sorted(s, key=lambda w: (-weight[w], w))
        tail = sum(weight[w] for w in s)
        least = bound * tail
        met: set[int] = set()
        for w in ordered:
            if tail < least:
                break
            tail -= weight[w]
            at = listed.setdefault(w, [])
            met.update(at)
            at.append(i)
        for j in met:
            yield i, j


def _largest_first(clusters: Sequence[int], rng: random.Random) -> list[list[int]]:
    """The items of each cluster; clusters of one size in random order."""
    members: dict[int, list[int]] = {}
    for item, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(item)
    groups = list(members.values())
    rng.shuffle(groups)
    groups.sort(key=len, reverse=True)
    return groups


def split_by_cluster(clusters: Sequence[int], sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[int]]:
    """Divide items into named parts of the given sizes; each cluster is used by one part only.

    Large clusters are placed first, each in the part that still lacks most. A part takes no more of a cluster
    than it needs, and no more than a quarter of its size, so that no single topic makes a part; what is left
    of that cluster is used nowhere. Returns item numbers in random order. Raises ValueError where the items do
    not suffice.
    """
    rng = random.Random(seed)
    groups = _largest_first(clusters, rng)
    parts: dict[str, list[int]] = {name: [] for name in sizes}
    for group in groups:
        name = max(sizes, key=lambda part: sizes[part] - len(parts[part]))
        need = sizes[name] - len(parts[name])
        if need <= 0:
            break
        parts[name] += rng.sample(group, min(need, len(group), max(1, sizes[name] // 4)))
    for name, size in sizes.items():
        if len(parts[name]) < size:
            raise ValueError(
                f"split {name!r}: {size} items asked for, but {len(clusters)} items in {len(groups)} similarity "
                f"clusters suffice for {len(parts[name])} only; ask for fewer"
            )
        rng.shuffle(parts[name])
    return parts


def split_whole_clusters(clusters: Sequence[int], targets: Mapping[str, int], seed: int = 0) -> dict[str, list[int]]:
    """Divide all items into named parts of about the given sizes; each cluster is in one part, whole.

    For sets of unknown size, of which nothing should be lost. Large clusters are placed first, in the part that lacks
    most among those of which it would be no more than a quarter; where there is none, in the part that lacks most.
    Parts of size 0 stay empty. Returns item numbers in random order.
    """
    rng = random.Random(seed)
    groups = _largest_first(clusters, rng)
    parts: dict[str, list[int]] = {name: [] for name in targets}
    wanted = [name for name, size in targets.items() if size > 0]
    for group in groups:
        fitting = [
            name for name in wanted
            if len(parts[name]) < targets[name] and len(group) <= max(1, targets[name] // 4)
        ]  # fmt: skip
        name = max(fitting or wanted, key=lambda part: targets[part] - len(parts[part]))
        parts[name] += group
    for items in parts.values():
        rng.shuffle(items)
    return parts

import math
import random
import string
from collections import Counter

import pytest

from fastguard.data import clusters as clusters_module
from fastguard.data.clusters import similarity_clusters, split_by_cluster, split_whole_clusters

TOPICS = ("volcano", "teapot", "glacier", "sparrow", "lantern", "saxophone", "cathedral", "umbrella")


def prompts():
    """Eight topics, three wordings each that share their rare words."""
    return [
        w.format(f"{t} {t}ish ancient {t[::-1]}")
        for t in TOPICS
        for w in ("Write a guide to {}", "Explain how to {}", "Give instructions for {}")
    ]


def test_wordings_of_one_request_share_a_cluster_and_topics_do_not():
    clusters = similarity_clusters(prompts())
    assert clusters == [i // 3 for i in range(24)]


def test_identical_texts_without_content_words_share_a_cluster():
    assert similarity_clusters(["how to do it", "how  to do it", "apples"]) == [0, 0, 1]


def test_threshold_is_inclusive_and_checked():
    assert similarity_clusters(["red apple", "red apple"], threshold=1.0) == [0, 0]
    for bad in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="threshold"):
            similarity_clusters(["a"], threshold=bad)


def test_no_item_and_no_cluster_is_in_two_parts():
    rng = random.Random(0)
    clusters = [rng.randrange(60) for _ in range(300)]
    parts = split_by_cluster(clusters, {"a": 40, "b": 30, "c": 12})
    assert {k: len(v) for k, v in parts.items()} == {"a": 40, "b": 30, "c": 12}
    used = [{clusters[i] for i in items} for items in parts.values()]
    for i in range(3):
        assert len(set(list(parts.values())[i])) == len(list(parts.values())[i])
        for j in range(i):
            assert not used[i] & used[j]


def test_one_large_cluster_does_not_make_a_part():
    clusters = [0] * 100 + list(range(1, 41))
    parts = split_by_cluster(clusters, {"a": 20, "b": 20})
    for items in parts.values():
        assert sum(clusters[i] == 0 for i in items) <= 5


def test_the_seed_decides_and_too_few_items_are_an_error():
    clusters = list(range(50))
    assert split_by_cluster(clusters, {"a": 10}, 1) == split_by_cluster(clusters, {"a": 10}, 1)
    assert split_by_cluster(clusters, {"a": 10}, 1) != split_by_cluster(clusters, {"a": 10}, 2)
    with pytest.raises(ValueError, match=r"split '[ab]': 30 items asked for"):
        split_by_cluster(clusters, {"a": 30, "b": 30})


def compared_pair_by_pair(texts, threshold):
    """The definition: components of the graph of all pairs at least ``threshold`` apart in cosine."""
    stems = [clusters_module._stems(t) for t in texts]
    seen = Counter(w for s in stems for w in s)
    weight = {w: math.log((len(texts) + 1) / (n + 0.5)) ** 2 for w, n in seen.items()}
    norm = [math.sqrt(sum(weight[w] for w in s)) for s in stems]
    label = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            shared = sum(weight[w] for w in stems[i] & stems[j])
            same = not stems[i] and not stems[j] and texts[i].split() == texts[j].split()
            if same or (shared and shared >= threshold * norm[i] * norm[j] * (1 - 1e-9)):
                old, new = label[i], label[j]
                label = [new if x == old else x for x in label]
    number = {}
    return [number.setdefault(x, len(number)) for x in label]


def zipf(count, words, seed):
    """Texts of words as unevenly common as in a language, a third of them changed in one or two words from another."""
    rng = random.Random(seed)
    known = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(400)]
    common = [1 / (i + 1) for i in range(400)]
    made = []
    for _ in range(count):
        text = rng.choices(known, common, k=rng.randint(0, words))
        if made and rng.random() < 0.35:
            text = list(rng.choice(made))
            for _ in range(min(len(text), rng.randint(0, 2))):
                text[rng.randrange(len(text))] = rng.choice(known)
        made.append(text)
    return [" ".join(text) for text in made]


@pytest.mark.parametrize("threshold", [0.2, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("words", [3, 12, 40])
def test_clusters_are_those_of_comparing_every_pair(threshold, words):
    texts = zipf(150, words, seed=words)
    found = similarity_clusters(texts, threshold)
    assert found == compared_pair_by_pair(texts, threshold)
    assert 1 < max(found) + 1 < 150


def test_few_pairs_are_compared():
    texts = zipf(600, 12, seed=1)
    stems = {i: clusters_module._stems(t) for i, t in enumerate(texts)}
    seen = Counter(w for s in stems.values() for w in s)
    weight = {w: math.log(601 / (n + 0.5)) ** 2 for w, n in seen.items()}
    pairs = list(clusters_module._candidates(stems, weight, 0.55))
    assert len(pairs) == len(set(pairs)) < 600 * 599 / 2 / 10


def test_whole_clusters_stay_whole_and_nothing_is_lost():
    rng = random.Random(0)
    clusters = [rng.randrange(60) for _ in range(300)] + [60] * 40
    targets = {"a": 200, "b": 100, "c": 40, "d": 0}
    parts = split_whole_clusters(clusters, targets, seed=1)
    assert sorted(i for items in parts.values() for i in items) == list(range(340))
    used = [{clusters[i] for i in items} for items in parts.values()]
    assert sum(len(u) for u in used) == len(set(clusters))  # each in one part
    assert {name: len(items) for name, items in parts.items()} == pytest.approx(targets, abs=4)
    assert 60 in used[0]  # the largest would be more than a quarter of the others
    assert parts == split_whole_clusters(clusters, targets, seed=1) != split_whole_clusters(clusters, targets, seed=2)

import random

import pytest

from fastguard.data.clusters import similarity_clusters, split_by_cluster

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

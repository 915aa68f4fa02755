"""Synthetic hidden states read as a model's do."""

import torch

from fastguard.bench import head, zipf


def drawn(**how):
    return zipf.reading(256, 256, 4000, torch.Generator().manual_seed(0), **how)


def test_the_rest_falls_as_a_power_of_the_rank():
    found = drawn(exponent=2.0)
    rest = (found.hidden @ found.head.t()).sort(-1, descending=True).values
    ranks = torch.tensor([10.0, 1000.0]).log()
    slope = (rest[:, 1000] - rest[:, 10]).mean() / (ranks[1] - ranks[0])
    assert -2.6 < slope < -1.4  # noise makes it flatter, a lean towards a token adds to the head alone
    flat = torch.randn(256, 256) @ torch.randn(256, 4000) / 16
    flat = flat.sort(-1, descending=True).values
    assert (flat[:, 1000] - flat[:, 10]).mean() / (ranks[1] - ranks[0]) > -0.6


def test_rows_go_from_certain_to_open_and_half_of_the_targets_are_where_they_lean():
    found = drawn()
    p = (found.hidden @ found.head.t()).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    assert entropy.quantile(0.1) < 0.4 and entropy.quantile(0.9) > 1.2
    assert 0.1 < p.gather(1, found.target[:, None]).mean() < 0.6


def test_more_columns_live_where_the_rest_is_flatter_and_where_a_row_leans_on_nothing():
    part = {
        name: head.live(found.hidden, found.head, found.target)
        for name, found in (("inner", drawn()), ("last", drawn(exponent=1.5)), ("sink", drawn(flat=1)))
    }
    assert part["inner"] < 0.6 * part["last"] and part["inner"] < part["sink"]

"""Samples as runs of rows: what lengths, offsets, bounds and masks come to, and what is refused."""

import pytest
import torch

from fastguard.ops import segments

PADDED, PACKED = torch.randn(3, 4, 2), torch.randn(12, 2)


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda v: torch.tensor(v, dtype=torch.int32)])
def test_what_each_description_comes_to(kind):
    whole = segments.bounds_of(PADDED)
    assert whole.tolist() == [[0, 4], [4, 8], [8, 12]] and whole.dtype == torch.int64
    assert segments.bounds_of(PADDED, lengths=kind([3, 0, 4])).tolist() == [[0, 3], [4, 4], [8, 12]]
    packed = segments.bounds_of(PACKED, offsets=kind([0, 5, 5, 12]))
    assert packed.tolist() == [[0, 5], [5, 5], [5, 12]]
    assert torch.equal(segments.bounds_of(PACKED, bounds=packed.int()), packed)
    assert segments.bounds_of(PACKED[:0], offsets=kind([0])).shape == (0, 2)
    assert segments.bounds_of(PADDED[:0], lengths=[]).shape == (0, 2)
    assert segments.bounds_of(PADDED[:, :0]).tolist() == [[0, 0]] * 3


MASKS = {
    "padding on the right": [[1, 1, 0], [1, 0, 0], [1, 1, 1]],
    "padding on either side, an empty sample": [[0, 1, 1], [0, 0, 0], [1, 0, 0]],
    "holes": [[1, 0, 1], [0, 1, 0], [0, 0, 0]],
    "one token": [[1], [0]],
    "no samples": [],
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_as_runs(case):
    """Each sample's rows are those that its mask names; rows are compacted only where a sample has holes."""
    mask = torch.tensor(MASKS[case]).view(-1, len(MASKS[case][0]) if MASKS[case] else 5)
    x = torch.randn(*mask.shape, 2)
    bounds, kept = segments.runs(mask)
    assert (kept is not None) == (case == "holes")
    flat = x.flatten(0, 1) if kept is None else x.flatten(0, 1)[kept]
    assert len(bounds) == len(mask)
    for sample, chosen, (begin, end) in zip(x, mask.bool(), bounds.tolist(), strict=True):
        assert torch.equal(flat[begin:end], sample[chosen])
    assert torch.equal(segments.bounds_of(flat, bounds=bounds), bounds)


def test_a_mask_without_tokens():
    bounds, kept = segments.runs(torch.ones(2, 0))
    assert bounds.tolist() == [[0, 0]] * 2 and kept is None


def test_rows_are_views_where_memory_allows():
    cut = torch.randn(3, 6, 2)[:, 1:5]  # its first two dimensions are not one
    for x in (PADDED, PACKED, cut):
        flat = x.flatten(0, -2)
        for begin, end in ((0, 4), (5, 7), (11, 12), (3, 3), (0, 0), (12, 12), (2, 9)):
            got = segments.rows(x, begin, end)
            assert torch.equal(got, flat[begin:end])
            if 0 < end - begin <= 4:
                assert got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    for begin, end in ((-1, 2), (3, 2), (0, 13)):
        with pytest.raises(ValueError, match=r"^bounds: expected ascending rows within 0 to 12, got"):
            segments.rows(PADDED, begin, end)


def integers(*values):
    return torch.tensor(values)


ERRORS = {
    "offsets beside lengths": (PADDED, {"lengths": [1, 1, 1], "offsets": [0, 12]}),
    "bounds beside offsets": (PACKED, {"offsets": [0, 12], "bounds": integers([0, 12])}),
    "lengths number": (PADDED, {"lengths": [1, 2]}),
    "lengths dtype": (PADDED, {"lengths": torch.ones(3)}),
    "lengths fractions": (PADDED, {"lengths": [1.5, 2, 3]}),
    "lengths range": (PADDED, {"lengths": [1, 5, 2]}),
    "lengths negative": (PADDED, {"lengths": [1, -1, 2]}),
    "lengths packed": (PACKED, {"lengths": [4, 4, 4]}),
    "lengths missing": (PACKED, {}),
    "lengths device": (PADDED, {"lengths": torch.ones(3, dtype=torch.long, device="meta")}),
    "offsets padded": (PADDED, {"offsets": [0, 12]}),
    "offsets none": (PACKED, {"offsets": []}),
    "offsets begin": (PACKED, {"offsets": [1, 12]}),
    "offsets end": (PACKED, {"offsets": [0, 11]}),
    "offsets beyond": (PACKED, {"offsets": [0, 13, 12]}),
    "offsets descending": (PACKED, {"offsets": [0, 7, 5, 12]}),
    "offsets shape": (PACKED, {"offsets": integers([0, 12])}),
    "bounds shape": (PACKED, {"bounds": integers([0, 1, 2])}),
    "bounds dimensions": (PACKED, {"bounds": integers(0, 12)}),
    "bounds number": (PACKED, {"bounds": torch.tensor(3)}),
    "bounds dtype": (PACKED, {"bounds": torch.ones(1, 2)}),
    "bounds range": (PACKED, {"bounds": integers([0, 13])}),
    "bounds negative": (PACKED, {"bounds": integers([-1, 3])}),
    "bounds descending": (PACKED, {"bounds": integers([0, 3], [6, 5])}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    x, options = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}: expected"):
        segments.bounds_of(x, **options)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)])
def test_a_mask_has_two_dimensions(shape):
    with pytest.raises(ValueError, match=r"^mask: expected \[B, T\]"):
        segments.runs(torch.ones(shape))

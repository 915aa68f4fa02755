"""ActSVD from Gram matrices against the published algorithm on explicit activations, in float64."""

import functools

import pytest
import torch

from checks import assert_agrees, assert_catches_spoiled
from fastguard.ops.gram import gram_
from fastguard.saliency.act_svd import act_svd_, keep_top, remove_orthogonal, remove_top, top_subspace
from fastguard.saliency.overlap import subspace_overlap
from tiny_models import tiny

# (O, I): by the outputs' side, square, by the inputs' side
SHAPES = [(24, 40), (32, 32), (60, 28)]


def published_basis(weight, x, q):
    """Wei et al.'s V [O, q]: the right singular vectors of the outputs x W^T."""
    return torch.linalg.svd(x @ weight.mT, full_matrices=False)[2][:q].mT


def published_low_rank(weight, x, rank, top_remove):
    """``top_remove``, or what they do without it: ``rank`` ranks fewer from the bottom."""
    total = min(weight.shape)
    v = published_basis(weight, x, rank if top_remove else total - rank)
    return weight - v @ v.mT @ weight if top_remove else v @ v.mT @ weight


def published_difference(weight, safety, utility, rank_pos, rank_neg):
    """``main_low_rank_diff``: projections of total - rank_pos and total - rank_neg ranks."""
    total = min(weight.shape)
    u, s = published_basis(weight, utility, total - rank_pos), published_basis(weight, safety, total - rank_neg)
    return weight - (torch.eye(len(weight)) - u @ u.mT) @ (s @ s.mT) @ weight


def draw(shape, seed=0, tokens=200):
    """A weight, and inputs of two kinds whose features are correlated and fall by two orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    weight, scale = normal(shape), torch.logspace(0, -2, shape[1], dtype=torch.float64)
    return weight, *((normal(tokens, shape[1]) * scale) @ normal(shape[1], shape[1]) for _ in range(2))


def gram_of(x, dtype=torch.float64):
    """Summed in three calls."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=dtype)
    for part in x.to(dtype).split(70):
        gram_(gram, part, offsets=[0, len(part)])
    return gram


def close(actual, expected, tolerance=1e-8):
    """Each entry, relative to the largest one."""
    assert float((actual.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_what_is_removed_and_kept_is_as_published(shape, rank):
    weight, x, _ = draw(shape)
    gram, total = gram_of(x), min(shape)
    v = top_subspace(weight, gram, rank)
    close(v.mT @ v, torch.eye(rank, dtype=torch.float64), 1e-13)
    for found, want in (
        (remove_top(weight, gram, rank), published_low_rank(weight, x, rank, top_remove=True)),
        (keep_top(weight, gram, total - rank), published_low_rank(weight, x, rank, top_remove=False)),
    ):
        assert_catches_spoiled(lambda w, want=want: close(w, want), found)
    close(remove_top(weight, gram, rank) + keep_top(weight, gram, rank), weight, 1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(3, 6), (20, 2), (10, 10)], ids=str)
def test_the_orthogonal_variant_is_as_published(shape, ranks):
    weight, safety, utility = draw(shape)
    total = min(shape)
    grams = gram_of(safety), gram_of(utility)
    found = remove_orthogonal(weight, *grams, *ranks)
    want = published_difference(weight, safety, utility, rank_pos=total - ranks[1], rank_neg=total - ranks[0])
    assert_catches_spoiled(lambda w: close(w, want), found)
    with pytest.raises(AssertionError):  # the two the other way round
        close(remove_orthogonal(weight, *grams[::-1], *ranks), want)
    with pytest.raises(AssertionError):
        close(remove_top(weight, grams[0], ranks[0]), want)


def test_what_the_utility_ranks_hold_is_not_touched():
    weight, safety, utility = draw((24, 40))
    s, u = gram_of(safety), gram_of(utility)
    close(remove_orthogonal(weight, s, s, 5, 5), weight, 1e-13)
    close(remove_orthogonal(weight, s, u, 5, 24), weight, 1e-13)
    close(remove_orthogonal(weight, s, u, 5, 0), remove_top(weight, s, 5), 1e-14)
    v, kept = top_subspace(weight, u, 7), remove_orthogonal(weight, s, u, 5, 7)
    close(v.mT @ kept, v.mT @ weight, 1e-13)
    close(remove_top(weight, s, 0), weight, 0)
    assert not keep_top(weight, s, 0).any()
    close(keep_top(weight, s, 24), weight, 1e-13)


def test_the_rest_is_the_nearest_of_its_rank():
    """No matrix of rank r has outputs nearer to W's than the kept part: the singular values left say how near."""
    weight, x, _ = draw((24, 40))
    left = torch.linalg.svdvals(x @ weight.mT)[6:].square().sum().sqrt()
    kept = keep_top(weight, gram_of(x), 6)
    assert float(torch.linalg.matrix_rank(kept)) == 6
    assert float((x @ (weight - kept).mT).norm()) == pytest.approx(float(left), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_narrow_weights_are_rounded_once(shape):
    """bf16 weights, an fp32 Gram matrix of bf16 inputs."""
    weight, x, _ = draw(shape)
    weight, x = weight.bfloat16(), x.bfloat16()
    found = remove_top(weight, gram_of(x.float(), torch.float32), 4)
    want = published_low_rank(weight.double(), x.double(), 4, top_remove=True)
    assert found.dtype == torch.bfloat16
    assert_catches_spoiled(lambda w: assert_agrees("weight", w, want, want.bfloat16(), ulps=0.1), found)


def test_the_randomised_subspace_is_the_exact_one_where_ranks_are_few():
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(150, 120, generator=g).double(), torch.randn(400, 120, generator=g).double()
    x = x * torch.logspace(0, -3, 120, dtype=torch.float64)
    gram = gram_of(x)
    exact = top_subspace(weight, gram, 4)
    found = top_subspace(weight, gram, 4, passes=6)
    assert 1 - subspace_overlap(exact, found) < 1e-8
    assert torch.equal(found, top_subspace(weight, gram, 4, passes=6, seed=0))
    assert 1 - subspace_overlap(exact, top_subspace(weight, gram, 4, passes=0)) > 1e-8
    close(remove_top(weight, gram, 4, passes=6), published_low_rank(weight, x, 4, top_remove=True), 1e-5)


def linears(model):
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}


def recorded(model, ids, mask):
    """The inputs of every linear at the tokens of the mask, as the published code keeps them."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0][mask].detach()))
        for n, m in linears(model).items()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("form", ["remove", "keep", "orthogonal"])
def test_a_model(form):
    """Every linear of a model, with its own number of ranks; Gram matrices of masked tokens."""
    model = tiny("llama", torch.float64)
    ids, mask = torch.randint(0, 50, (2, 8, 30)), torch.rand(2, 8, 30) < 0.7
    inputs = [recorded(model, i, m) for i, m in zip(ids, mask, strict=True)]
    grams = [{n: gram_of(x) for n, x in seen.items()} for seen in inputs]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ranks = {n: 1 + i % 5 for i, n in enumerate(grams[0])}
    more = {"utility": grams[1], "utility_rank": 2} if form == "orthogonal" else {}
    changed = act_svd_(model, grams[0], form=form, safety_rank=ranks, **more)
    assert changed.keys() == ranks.keys() == linears(model).keys()
    for name, p in model.named_parameters():
        if name not in ranks:
            assert torch.equal(p, before[name]), name
            continue
        w, total = before[name], min(p.shape)
        if form == "orthogonal":
            want = published_difference(w, inputs[0][name], inputs[1][name], total - 2, total - ranks[name])
        else:
            rank = ranks[name] if form == "remove" else total - ranks[name]
            want = published_low_rank(w, inputs[0][name], rank, top_remove=form == "remove")
        close(p.detach(), want)
        assert changed[name] == pytest.approx(float((want - w).square().sum() / w.square().sum()))
    assert all(0 < share < 1 for share in changed.values())


NAME = "model.layers.1.mlp.up_proj.weight"
E_ = {NAME: torch.eye(32)}
ERRORS = {
    "form": (E_, {"form": "both"}),
    "utility: expected a value": (E_, {"form": "orthogonal", "utility_rank": 1}),
    "utility: expected None": (E_, {"utility": E_}),
    "utility_rank: expected a value": (E_, {"form": "orthogonal", "utility": E_}),
    "utility: expected the names of safety": (E_, {"form": "orthogonal", "utility": {}, "utility_rank": 1}),
    "safety: expected the names of matrices": (E_ | {"model.norm.weight": torch.eye(32)}, {}),
    "safety: expected the names of matrices .* 'nothing' .no such": (E_ | {"nothing": torch.eye(32)}, {}),
    f"safety: {NAME}: expected float32 or float64 .32, 32.": ({NAME: torch.eye(31)}, {}),
    f"safety: {NAME}: expected finite": ({NAME: torch.full((32, 32), torch.nan)}, {}),
    "safety_rank: expected a rank for": (E_, {"safety_rank": {}}),
    f"safety_rank: {NAME}: expected 0 to 32": (E_, {"safety_rank": 33}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_and_change_nothing(message):
    model = tiny("llama", torch.float64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grams, options = ERRORS[message]
    with pytest.raises(ValueError, match=rf"^{message}"):
        act_svd_(model, grams, **({"form": "remove", "safety_rank": 2} | options))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_errors_of_the_pure_functions():
    weight, gram = torch.randn(6, 4), torch.eye(4)
    with pytest.raises(ValueError, match="rank: expected 0 to 4"):
        top_subspace(weight, gram, 5)
    with pytest.raises(ValueError, match=r"gram: expected float32 or float64 \[4, 4\], got torch.bfloat16"):
        remove_top(weight, gram.bfloat16(), 2)
    with pytest.raises(ValueError, match=r"weight: expected a floating \[O, I\]"):
        keep_top(weight[0], gram, 2)
    with pytest.raises(ValueError, match=r"utility: expected torch.float32 as safety"):
        remove_orthogonal(weight, gram, gram.double(), 1, 1)
    with pytest.raises(ValueError, match="utility_rank: expected 0 to 4"):
        remove_orthogonal(weight, gram, gram, 1, 5)

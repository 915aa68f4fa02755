"""ActSVD: the ranks of a linear map's outputs that safety rests on, taken out of its weight or kept alone.

Wei et al. 2024, arXiv 2402.05162. For inputs X [T, I] (the tokens of the answers) and a weight W [O, I], the outputs
X W^T have right singular vectors V [O, r]; the projection on the leading ones is P = V V^T, and P W is the matrix of
rank r whose outputs are nearest to W's. V also holds the leading eigenvectors of W C W^T with C = X^T X, which is all
that is asked for here: ``fastguard.gram_`` sums C over any number of tokens and no activation is kept.

A rank here is the number of directions that a projection holds. The published code counts three ways; of the min(O, I)
ranks of a weight:

=================  ===================================  =====================================================
here               published                            what becomes of W
=================  ===================================  =====================================================
``remove_top``     ``rank``, with ``top_remove``        W - P_s W, P_s of rank ``rank``
``keep_top``       min(O, I) - ``rank``, without it     P_s W: the published ``rank`` is what the bottom loses
``orthogonal``     ``rank_neg``, ``rank_pos``           W - (I - P_u) P_s W with P_s of rank min(O, I) - ``rank_neg``
                                                        (safety), P_u of rank min(O, I) - ``rank_pos`` (utility)
=================  ===================================  =====================================================

So the published ``rank_pos=3000`` at 4096 features is ``utility_rank=1096`` here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastguard.low_rank import Products, top_svd

FORMS = ("remove", "keep", "orthogonal")


@torch.no_grad()
def top_subspace(weight: Tensor, gram: Tensor, rank: int, *, passes: int | None = None, seed: int = 0) -> Tensor:
    """The directions V [O, rank] of a linear map's outputs that hold most of their squared norm; orthonormal columns.

    Args:
        weight: W [O, I], any floating dtype.
        gram: C [I, I], the sum of x x^T over the inputs, fp32 or float64.
        rank: how many, at most min(O, I). Where the inputs have fewer, the rest is arbitrary, as published.
        passes: None: exact, in float64, by an eigendecomposition on the shorter side. Otherwise the subspace
            iterations of a randomised one in the dtype of gram, which costs products of width ``rank`` + 16 alone; the
            published code takes 20.
        seed: of the randomised one.

    Returns:
        V in the dtype of gram, the first direction first.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check("gram", weight, gram)
    _check_rank("rank", rank, weight)
    if not rank:
        return gram.new_zeros(weight.shape[0], 0)
    if passes is not None:
        w = weight.to(gram.dtype)

        def times(y: Tensor) -> Tensor:
            return w @ (gram @ (w.mT @ y))

        side = w.shape[0]
        return top_svd(Products((side, side), times, times, gram.dtype, gram.device), rank, passes=passes, seed=seed)[0]
    w, c = weight.double(), gram.double()
    if w.shape[0] <= w.shape[1]:
        return torch.linalg.eigh(w @ c @ w.mT)[1].flip(1)[:, :rank].to(gram.dtype)
    values, vectors = torch.linalg.eigh(c)
    root = w @ (vectors * values.clamp(min=0).sqrt())  # W C W^T = root root^T, and root^T root is smaller
    leading = torch.linalg.eigh(root.mT @ root)[1].flip(1)[:, :rank]
    return torch.linalg.qr(root @ leading)[0].to(gram.dtype)


def remove_top(weight: Tensor, gram: Tensor, rank: int, *, passes: int | None = None, seed: int = 0) -> Tensor:
    """W - V V^T W: a weight [O, I] without its ``rank`` leading directions under these inputs.

    As ``top_subspace``; arithmetic in the dtype of gram, rounded once to that of weight.
    """
    return (weight.to(gram.dtype) - _part(weight, gram, rank, passes, seed)).to(weight.dtype)


def keep_top(weight: Tensor, gram: Tensor, rank: int, *, passes: int | None = None, seed: int = 0) -> Tensor:
    """V V^T W: the matrix of this rank whose outputs, under these inputs, are nearest to those of a weight [O, I].

    As ``top_subspace``; arithmetic in the dtype of gram, rounded once to that of weight.
    """
    return _part(weight, gram, rank, passes, seed).to(weight.dtype)


def remove_orthogonal(
    weight: Tensor,
    safety: Tensor,
    utility: Tensor,
    safety_rank: int,
    utility_rank: int,
    *,
    passes: int | None = None,
    seed: int = 0,
) -> Tensor:
    """W - (I - P_u) P_s W: a weight [O, I] without what is of its safety ranks and not of its utility ranks.

    Args:
        weight: W [O, I], any floating dtype.
        safety, utility: [I, I], the sums of x x^T over either inputs, in one dtype, fp32 or float64.
        safety_rank, utility_rank: of P_s and P_u, as in the table above.
        passes, seed: as ``top_subspace`` takes them.

    Returns:
        [O, I] in the dtype of weight; arithmetic in that of safety, rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check("safety", weight, safety)
    _check("utility", weight, utility)
    if utility.dtype != safety.dtype:
        raise ValueError(f"utility: expected {safety.dtype} as safety, got {utility.dtype}")
    _check_rank("safety_rank", safety_rank, weight)
    _check_rank("utility_rank", utility_rank, weight)
    part = _part(weight, safety, safety_rank, passes, seed)
    useful = top_subspace(weight, utility, utility_rank, passes=passes, seed=seed)
    return (weight.to(part.dtype) - part + useful @ (useful.mT @ part)).to(weight.dtype)


@torch.no_grad()
def act_svd_(
    model: nn.Module,
    safety: Mapping[str, Tensor],
    utility: Mapping[str, Tensor] | None = None,
    *,
    form: str,
    safety_rank: int | Mapping[str, int],
    utility_rank: int | Mapping[str, int] | None = None,
    passes: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Remove or keep the safety ranks of a model's linear maps, IN PLACE, one weight at a time.

    Args:
        model: whole weights; adapters merged.
        safety: the Gram matrix [I, I] of its inputs on safety data for each weight [O, I] that is to change, by the
            parameter's name; weights that read the same input may share one.
        utility: the same on harmless data, for the same names; with form "orthogonal" alone.
        form: "remove" (``remove_top``), "keep" (``keep_top``) or "orthogonal" (``remove_orthogonal``).
        safety_rank, utility_rank: directions that each projection holds: one number, or one a name.
        passes, seed: as ``top_subspace`` takes them.

    Returns:
        By name, how much of the weight's squared norm the stored change has.

    Raises:
        ValueError: an argument that does not fit, a name that is no matrix of the model, a sharded weight, a Gram
            matrix that is not finite. Nothing is changed then.
    """
    ranks = _checked(model, safety, utility, form, safety_rank, utility_rank)
    parameters, changed = dict(model.named_parameters()), {}
    for name, gram in safety.items():
        weight = parameters[name]
        rank, useful = ranks[name]
        here = gram.to(weight.device)
        if form == "orthogonal":
            assert utility is not None
            there = utility[name].to(weight.device)
            after = remove_orthogonal(weight, here, there, rank, useful, passes=passes, seed=seed)
        else:
            after = (remove_top if form == "remove" else keep_top)(weight, here, rank, passes=passes, seed=seed)
        size = float(weight.double().square().sum())
        moved = float((weight.double() - after.double()).square().sum())
        changed[name] = moved / size if size else 0.0
        weight.copy_(after)
    return changed


@torch.no_grad()
def _part(weight: Tensor, gram: Tensor, rank: int, passes: int | None, seed: int) -> Tensor:
    """V V^T W in the dtype of gram."""
    v = top_subspace(weight, gram, rank, passes=passes, seed=seed)
    return v @ (v.mT @ weight.to(v.dtype))


def _check(name: str, weight: Tensor, gram: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating [O, I], got {weight.dtype} {list(weight.shape)}")
    if gram.shape != (weight.shape[1], weight.shape[1]) or gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: expected float32 or float64 [{weight.shape[1]}, {weight.shape[1]}], got {gram.dtype} "
            f"{list(gram.shape)}"
        )


def _check_rank(name: str, rank: int, weight: Tensor) -> None:
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"{name}: expected 0 to {min(weight.shape)} for a weight {list(weight.shape)}, got {rank}")


def _checked(
    model: nn.Module,
    safety: Mapping[str, Tensor],
    utility: Mapping[str, Tensor] | None,
    form: str,
    safety_rank: int | Mapping[str, int],
    utility_rank: int | Mapping[str, int] | None,
) -> dict[str, tuple[int, int]]:
    """The ranks of each name, safety's and utility's (0 where there is none)."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    both = form == "orthogonal"
    for argument, value in (("utility", utility), ("utility_rank", utility_rank)):
        if (value is not None) != both:
            raise ValueError(f"{argument}: expected {'a value' if both else 'None'} with form {form!r}, got {value!r}")
    if utility is not None and utility.keys() != safety.keys():
        odd = min(utility.keys() ^ safety.keys())
        raise ValueError(f"utility: expected the names of safety, got {odd!r} in one of them alone")
    parameters, ranks = dict(model.named_parameters()), {}
    for name in safety:
        weight = parameters.get(name)
        if weight is None or weight.dim() != 2:
            what = "no such parameter" if weight is None else list(weight.shape)
            raise ValueError(f"safety: expected the names of matrices of the model, got {name!r} ({what})")
        if hasattr(weight, "full_tensor"):
            raise ValueError(f"model: expected whole weights, got {name} sharded over ranks")
        found = []
        for argument, grams, rank in (("safety", safety, safety_rank), ("utility", utility, utility_rank)):
            if grams is None or rank is None:
                found.append(0)
                continue
            _check(f"{argument}: {name}", weight, grams[name])
            if not bool(torch.isfinite(grams[name]).all()):
                raise ValueError(f"{argument}: {name}: expected finite numbers, got inf or NaN")
            own = rank if isinstance(rank, int) else rank.get(name)
            if own is None:
                raise ValueError(f"{argument}_rank: expected a rank for {name!r}, got none")
            _check_rank(f"{argument}_rank: {name}", own, weight)
            found.append(own)
        ranks[name] = (found[0], found[1])
    return ranks

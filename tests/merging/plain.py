"""Merges of whole tensors in float64, written out plainly from the papers: what the streamed ones are held against."""

import math

import torch

from fastguard.merging.drop import keep


def linear(tensors, weights, normalize=True):
    total = sum(w * t for w, t in zip(weights, tensors, strict=True))
    return total / sum(weights) if normalize else total


def slerp(base, model, t):
    cosine = float((base * model).sum() / (base.norm() * model.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * model
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * base + math.sin(t * angle) * model) / math.sin(angle)


def task_arithmetic(base, models, weights, scale=1.0, normalize=False):
    delta = sum(w * (m - base) for w, m in zip(weights, models, strict=True))
    return base + scale * delta / (sum(weights) if normalize else 1)


def trim(delta, density):
    flat = delta.flatten()
    kept = torch.zeros_like(flat)
    order = torch.sort(flat.abs(), descending=True, stable=True)[1][: max(1, int(density * len(flat)))]
    kept[order] = flat[order]
    return kept.view_as(delta)


def elect(base, deltas, weights, normalize, scale=1.0):
    stacked = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == sign
    mixed = (stacked * agree).sum(0)
    if normalize:
        divisor = sum(w * a.double() for w, a in zip(weights, agree, strict=True))
        mixed = mixed / torch.where(divisor == 0, 1.0, divisor)
    return base + scale * mixed


def ties(base, models, weights, densities, normalize=True, scale=1.0):
    deltas = [trim(m - base, d) for m, d in zip(models, densities, strict=True)]
    return elect(base, deltas, weights, normalize, scale)


def drop(delta, density, name, seed=0, model=0, rescale=True):
    kept = keep(delta.numel(), 0, density, seed=seed, tensor=name, model=model).view_as(delta)
    return delta * kept / (density if rescale else 1)


def dare_linear(base, models, weights, densities, name, seed=0, rescale=True):
    deltas = [drop(m - base, d, name, seed, i, rescale) for i, (m, d) in enumerate(zip(models, densities, strict=True))]
    return base + sum(w * d for w, d in zip(weights, deltas, strict=True))


def dare_ties(base, models, weights, densities, name, seed=0):
    deltas = [drop(m - base, d, name, seed, i) for i, (m, d) in enumerate(zip(models, densities, strict=True))]
    return elect(base, deltas, weights, False)


def resta(model, aligned, unaligned, gamma, density=1.0, base=None, name="", seed=0):
    if density < 1:
        base = aligned if base is None else base
        model = base + drop(model - base, density, name, seed)
    return model + gamma * (aligned - unaligned)


def published_projection(aligned, base):
    v = aligned - base
    return v @ v.T / v.norm()


def projector(aligned, base, rank=None):
    u, s, _ = torch.linalg.svd(aligned - base, full_matrices=False)
    u = u[:, : int((s > 1e-9 * s[0]).sum()) if rank is None else rank]
    return u @ u.T


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def lox(model, base, rank, coefficient):
    u, s, vh = torch.linalg.svd(model - base, full_matrices=False)
    return model + coefficient * (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def somf(safe, models, logits, coefficient, export, name, seed=0):
    p = torch.ones_like(safe) if logits is None else 1 / (1 + torch.exp(-logits.double()))
    if export == "probability" or logits is None:
        m = p
    elif export == "threshold":
        m = (p > 0.5).double()
    else:
        m = keep(p.numel(), 0, p.flatten(), seed=seed, tensor=name, model=0).view_as(p).double()
    return safe + coefficient * sum((model - safe) * m / m.mean() for model in models)

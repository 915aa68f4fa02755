"""Ablation at the residual stream by hooks, and tiny models in folders: what edited weights are held against."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_models import COMMON, tiny

WIDTH = COMMON["hidden_size"]


def basis(k=2, seed=0, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, k, dtype=torch.float64, generator=g))[0].T.contiguous()


def folder(path, name, dtype=torch.float64, shards=False, **changes):
    model = tiny(name, dtype, **changes).eval()
    model.save_pretrained(path, **({"max_shard_size": "20KB"} if shards else {}))
    return path


def load(path, dtype=torch.float64):
    moe = hasattr(AutoConfig.from_pretrained(path), "num_local_experts")  # whose fused kernels know no float64
    model, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **({"experts_implementation": "eager"} if moe else {})
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], found
    return model.eval()


def tokens(seed=5):
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def blocks_of(layer):
    names = dict(layer.named_children())
    return [names[n] for n in ("self_attn", "attn", "mlp", "block_sparse_moe") if n in names]


def project(y, q):
    first = y[0] if isinstance(y, tuple) else y
    cut = first - (first @ q.T) @ q
    return (cut, *y[1:]) if isinstance(y, tuple) else cut


def projected_logits(model, q):
    """The logits with the directions projected out of the embedding and of every attention's and MLP's output."""
    layers = layers_of(model)

    def at_input(module, args, kwargs):
        if args:
            return (project(args[0], q), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": project(kwargs["hidden_states"], q)}

    handles = [layers[0].register_forward_pre_hook(at_input, with_kwargs=True)]
    for layer in layers:
        assert len(blocks_of(layer)) == 2
        handles += [b.register_forward_hook(lambda m, a, y: project(y, q)) for b in blocks_of(layer)]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def stream_shares(model, q):
    """At every layer's input and output: the share of the stream that is along the directions."""
    found = []

    def note(module, args, kwargs, y):
        for h in (args[0] if args else kwargs["hidden_states"], y[0] if isinstance(y, tuple) else y):
            found.append(float((h @ q.T).norm() / h.norm()))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers_of(model)]
    try:
        logits(model)
        return found
    finally:
        for handle in handles:
            handle.remove()


def relative(a, b):
    return float((a - b).norm() / b.norm())

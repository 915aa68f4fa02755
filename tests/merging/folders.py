"""Tiny models in folders, related as merges want them: a base, it aligned, and that fine-tuned."""

import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny_models import tiny

SHARDS = {"base": "20KB", "aligned": "30KB", "model": "1GB", "other": "14KB"}
"""Each sharded differently; ``model`` in one file."""


def family(path, name="llama", dtype=torch.float64, rank=None, **changes):
    """Folders ``base``, ``aligned``, ``model`` and ``other``; alignment's change of this rank, or of any."""
    base = tiny(name, torch.float64, **changes)
    state = {k: t.clone() for k, t in base.state_dict().items()}
    g = torch.Generator().manual_seed(1)

    def changed(state, size, rank=None):
        def noise(t):
            if rank is None or t.dim() != 2:
                return torch.randn(t.shape, dtype=t.dtype, generator=g)
            left, right = (torch.randn(n, rank, dtype=t.dtype, generator=g) for n in t.shape)
            return left @ right.T

        return {k: t + size * noise(t) for k, t in state.items()}

    aligned = changed(state, 0.05, rank)
    states = {"base": state, "aligned": aligned, "model": changed(aligned, 0.03), "other": changed(state, 0.04)}
    for role, one in states.items():
        if base.config.tie_word_embeddings:
            one["lm_head.weight"] = next(t for k, t in one.items() if k.endswith(("embed_tokens.weight", "wte.weight")))
        base.load_state_dict(one)
        base.to(dtype).save_pretrained(path / role, max_shard_size=SHARDS[role])
        base.to(torch.float64)
    (path / "base" / "tokenizer.json").write_text('{"of": "base"}')
    (path / "model" / "tokenizer.json").write_text('{"of": "model"}')
    return path


def weights(folder, wide=torch.float64):
    """All tensors of a folder, by name."""
    return {k: t.to(wide) for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


def stored(folder):
    return {k: t for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


def load(folder, dtype=torch.float64):
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], found
    return model.eval()


def logits(model):
    tokens = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def config(folder):
    return json.loads((folder / "config.json").read_text())


def close(a, b):
    """Both as one long vector: the relative error."""
    return float(torch.cat([(a[k].double() - b[k]).flatten() for k in b]).norm()) / float(
        torch.cat([t.flatten() for t in b.values()]).norm()
    )

"""Tiny random language models of many architectures, and paired batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 97

COMMON: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    attention_dropout=0.0,
)  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama_tied": ("Llama", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=4)),
    "gemma2": ("Gemma2", dict(head_dim=8, final_logit_softcapping=2.0, sliding_window=4, query_pre_attn_scalar=8)),
    "phi": ("Phi", dict(resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt_neox": ("GPTNeoX", dict(hidden_dropout=0.0)),
    "mixtral": (
        "Mixtral",
        dict(experts_implementation="eager", num_local_experts=3, num_experts_per_tok=2, sliding_window=None),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            experts_implementation="eager",
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
        ),
    ),
    "cohere": ("Cohere", dict(logit_scale=0.25)),
    "granite": ("Granite", dict(logits_scaling=3.0)),
    "opt": ("OPT", dict(ffn_dim=40, word_embed_proj_dim=32, do_layer_norm_before=True, dropout=0.0)),
    "gpt2": ("GPT2", dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
}


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model whose norms are not at their initial ones, in training mode."""
    kind, special = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **special, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype).train()


def transform(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the model does to its head's output, said once more and by hand."""
    config = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return lambda z: cap * torch.tanh(z / cap)
    if config.model_type == "cohere":
        return lambda z: z * config.logit_scale
    if config.model_type == "granite":
        return lambda z: z / config.logits_scaling
    return lambda z: z


def pair(
    batch: int = 3, length: int = 9, prompt: int = 3, seed: int = 0, padding: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A paired batch: equal prompts; answers that differ at most tokens, agree at some, and hold token id 0."""
    g = torch.Generator().manual_seed(seed + 100)
    harmful = torch.randint(1, VOCABULARY, (batch, length), generator=g)
    harmless = harmful.clone()
    harmless[:, prompt:] = torch.randint(1, VOCABULARY, (batch, length - prompt), generator=g)
    harmless[0, prompt + 2] = harmful[0, prompt + 2]  # an island of agreement: its successor is a boundary row
    harmful[1 % batch, prompt + 1] = 0
    masks = torch.ones_like(harmful), torch.ones_like(harmful)
    if padding:
        harmless[-1, -2:], masks[1][-1, -2:] = 2, 0
        harmful[0, -1:], masks[0][0, -1:] = 2, 0
    return (
        {"input_ids": harmful, "attention_mask": masks[0]},
        {"input_ids": harmless, "attention_mask": masks[1]},
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, taken off the model."""
    found = {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each tensor's norm; what is zero in exact arithmetic (a bias on attention keys) may be noise."""
    assert found.keys() == expected.keys()
    noise = 1e-14 * max(float(reference.double().norm()) for reference in expected.values())
    for name, reference in expected.items():
        error = float((found[name].double() - reference.double()).norm())
        scale = float(reference.double().norm())
        assert error <= tolerance * scale + noise, f"{name}: {error:.3e} > {tolerance:g} x {scale:.3e}"

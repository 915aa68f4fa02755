"""A language model as numbers: its parameters exactly, its products per token, from its configuration.

Models of Llama's make: grouped-query attention, gated MLP (dense, or routed to some of E experts), RMS norms, a head
that may be the embedding. Shapes: L layers, D hidden, H heads of size h, K key-value heads, F the MLP's width, V
vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """The shape of a model.

    Attributes:
        biases: parameters of a layer's biases. norms: RMS norms of width D in a layer. qk_norm: whether queries and
            keys have norms too, of width h.
        experts: 0 for a dense MLP, else how many there are; ``active`` of them compute a token. ``intermediate`` is
            the width of one.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    biases: int = 0
    norms: int = 2
    qk_norm: bool = False
    experts: int = 0
    active: int = 0

    @property
    def attention_width(self) -> int:
        """H h, the width of the queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K h, the width of keys and of values."""
        return self.kv_heads * self.head_dim

    @property
    def attention(self) -> int:
        """Weights of a layer's q, k, v and o projections: D (H h + K h + K h) + H h D."""
        return 2 * self.hidden * (self.attention_width + self.kv_width)

    @property
    def mlp(self) -> int:
        """Weights of a layer's gate, up and down projections, 3 D F; all experts and the router D E."""
        return 3 * self.hidden * self.intermediate * max(self.experts, 1) + self.hidden * self.experts

    @property
    def vectors(self) -> int:
        """Parameters of a layer that are in no product: norm weights and biases."""
        return self.norms * self.hidden + self.biases + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return self.attention + self.mlp + self.vectors

    @property
    def products(self) -> int:
        """Weights of a layer that multiply each token: all but the vectors and the experts it is not routed to."""
        mlp = 3 * self.hidden * self.intermediate * (self.active or 1) + self.hidden * self.experts
        return self.attention + mlp

    @property
    def down(self) -> int:
        """Weights of a layer's last product that multiply each token."""
        return self.hidden * self.intermediate * (self.active or 1)

    @property
    def head(self) -> int:
        """Weights of the head, V D."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, final norm, and the head where it is not the embedding."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer + self.root

    def adapter(self, rank: int) -> int:
        """LoRA parameters of rank r on all seven projections of all layers: r (in + out) each.

        Raises ValueError for a mixture of experts.
        """
        if self.experts:
            raise ValueError(f"lora: {self.name} is a mixture of experts; expected a dense model")
        d, q, k, f = self.hidden, self.attention_width, self.kv_width, self.intermediate
        return self.layers * rank * (2 * (d + q) + 2 * (d + k) + 3 * (d + f))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "phi3": {}, "granite": {}, "smollm3": {}, "mixtral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True}, "qwen3_moe": {"qk_norm": True},
    "gemma": {"tied": True}, "gemma2": {"tied": True, "norms": 4},
}  # fmt: skip
"""``model_type`` of a configuration, and in what the family differs from Llama."""

EXPERT_KEYS = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}
"""Families with routed experts: the keys of their number and of the width of one."""

SYNONYMS = {"num_experts": "num_local_experts"}
"""Keys under which newer versions of transformers may write the same."""


def from_config(config: Mapping[str, Any], name: str = "model") -> Architecture:
    """The architecture of a Hugging Face ``config.json``. Raises ValueError that names the key."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{name}: model_type: expected one of {', '.join(FAMILIES)}, got {family!r}")

    def need(key: str) -> int:
        value = config.get(key, config.get(SYNONYMS.get(key, key)))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {key}: expected an integer of 1 or more, got {value!r}")
        return value

    experts_key, width_key = EXPERT_KEYS.get(family, (None, "intermediate_size"))
    if family == "qwen3_moe" and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")):
        raise ValueError(f"{name}: expected experts in every layer, got decoder_sparse_step or mlp_only_layers")
    special = FAMILIES[family]
    heads = need("num_attention_heads")
    tied = config.get("tie_word_embeddings")
    return _build(
        name, need("num_hidden_layers"), need("hidden_size"), need(width_key), heads,
        config.get("num_key_value_heads") or heads, need("vocab_size"),
        head_dim=config.get("head_dim"),
        tied=special.get("tied", False) if tied is None else bool(tied),
        qkv_bias=special.get("qkv_bias", False),
        attention_bias=bool(config.get("attention_bias", False)) and family not in ("mistral", "mixtral", "phi3"),
        mlp_bias=bool(config.get("mlp_bias", False)) and family in ("llama", "granite", "smollm3"),
        qk_norm=special.get("qk_norm", False), norms=special.get("norms", 2),
        experts=need(experts_key) if experts_key else 0, active=need("num_experts_per_tok") if experts_key else 0,
    )  # fmt: skip


def _build(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, *,
    head_dim: int | None = None, tied: bool = False, qkv_bias: bool = False, attention_bias: bool = False,
    mlp_bias: bool = False, qk_norm: bool = False, norms: int = 2, experts: int = 0, active: int = 0,
) -> Architecture:  # fmt: skip
    size = head_dim or hidden // heads
    biases = (heads + 2 * kv_heads) * size if qkv_bias or attention_bias else 0
    biases += hidden if attention_bias else 0
    biases += 2 * intermediate + hidden if mlp_bias else 0
    return Architecture(
        name, layers, hidden, intermediate, heads, kv_heads, size, vocabulary, tied, biases, norms, qk_norm, experts,
        active,
    )  # fmt: skip


#                           layers  hidden   MLP  heads  kv  vocabulary
_MODELS = (
    _build("llama-2-7b",        32,  4096, 11008,  32, 32,  32000),
    _build("llama-2-13b",       40,  5120, 13824,  40, 40,  32000),
    _build("llama-2-70b",       80,  8192, 28672,  64,  8,  32000),
    _build("llama-3-8b",        32,  4096, 14336,  32,  8, 128256),
    _build("llama-3-70b",       80,  8192, 28672,  64,  8, 128256),
    _build("llama-3.1-405b",   126, 16384, 53248, 128,  8, 128256),
    _build("llama-3.2-1b",      16,  2048,  8192,  32,  8, 128256, tied=True),
    _build("llama-3.2-3b",      28,  3072,  8192,  24,  8, 128256, tied=True),
    _build("mistral-7b",        32,  4096, 14336,  32,  8,  32000),
    _build("mixtral-8x7b",      32,  4096, 14336,  32,  8,  32000, experts=8, active=2),
    _build("qwen2.5-0.5b",      24,   896,  4864,  14,  2, 151936, tied=True, qkv_bias=True),
    _build("qwen2.5-7b",        28,  3584, 18944,  28,  4, 152064, qkv_bias=True),
    _build("qwen2.5-72b",       80,  8192, 29568,  64,  8, 152064, qkv_bias=True),
    _build("qwen3-8b",          36,  4096, 12288,  32,  8, 151936, head_dim=128, qk_norm=True),
    _build("gemma-2-2b",        26,  2304,  9216,   8,  4, 256000, head_dim=256, tied=True, norms=4),
    _build("gemma-2-9b",        42,  3584, 14336,  16,  8, 256000, head_dim=256, tied=True, norms=4),
    _build("smollm2-135m",      30,   576,  1536,   9,  3,  49152, tied=True),
    _build("smollm2-360m",      32,   960,  2560,  15,  5,  49152, tied=True),
    _build("smollm2-1.7b",      24,  2048,  8192,  32, 32,  49152, tied=True),
)  # fmt: skip

MODELS = {model.name: model for model in _MODELS}
"""Known by name. Llama 3.1's 8B and 70B have the shapes of Llama 3's."""

ALIASES = {"smollm2": "smollm2-135m", "llama-3.1-8b": "llama-3-8b", "llama-3.1-70b": "llama-3-70b"}


def find(model: str) -> Architecture:
    """A model by name, by its Hugging Face folder or config.json, or by a fastguard YAML whose ``model.name`` is one.

    Raises FileNotFoundError, or ValueError for a model that cannot be planned.
    """
    path = Path(model)
    known = model.rsplit("/", 1)[-1].lower().removesuffix("-instruct").removeprefix("meta-")
    known = ALIASES.get(known, known)
    if not path.exists() and known in MODELS:
        return MODELS[known]
    if path.suffix in (".yaml", ".yml"):
        from fastguard.run.config import load

        name = load(path).model.name
        if Path(name).suffix in (".yaml", ".yml"):
            raise ValueError(f"{path}: model.name: expected a model, got another configuration {name!r}")
        return find(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"model: no folder or file {str(file)!r}, and the models known by name are {', '.join(MODELS)}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected an object, got {type(config).__name__}")
    return from_config(config, path.name if path.is_dir() else path.parent.name or path.stem)

"""A chat model and a tokenizer small enough to train in a test, made from nothing but a seed."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastguard.models import PLAIN_CHATML


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's two marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i + 2 for i, c in enumerate(alphabet)} | {"<|im_start|>": 0, "<|im_end|>": 1}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    made.chat_template = PLAIN_CHATML
    return made


def model(seed: int = 0, vocabulary: int = 258) -> LlamaForCausalLM:
    """Two layers, 32 features, tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=1,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def folder(path: Path, vocabulary: int = 258) -> Path:
    """Model and tokenizer, saved as ``from_pretrained`` wants them."""
    model(vocabulary=vocabulary).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path

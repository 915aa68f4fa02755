"""A tiny chat model that answers one kind of prompt with "sorry", because of one direction of its stream."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastguard.models import PLAIN_CHATML

MARKS = ("<|im_start|>", "<|im_end|>")
BAD, GOOD = ([f"{kind}{i}" for i in range(20)] for kind in "bg")
WORDS = [*MARKS, "[unk]", "user", "assistant", "sorry", "I", "As", "Sorry", *BAD, *GOOD]
SORRY = WORDS.index("sorry")
LAYERS = 5


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the template's end is three of them."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=MARKS[1], pad_token=MARKS[1], unk_token="[unk]")
    made.add_special_tokens({"additional_special_tokens": list(MARKS)})
    made.chat_template = PLAIN_CHATML
    return made


def model() -> tuple[LlamaForCausalLM, Tensor]:
    """The model and the direction [D]: bad words' embeddings hold it, attention carries it on, the head answers it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=1, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    direction = torch.randn(32)
    direction /= direction.norm()
    with torch.no_grad():
        embedding, head = made.model.embed_tokens.weight, made.lm_head.weight
        embedding.normal_()
        embedding -= (embedding @ direction)[:, None] * direction
        embedding[WORDS.index(BAD[0]) : WORDS.index(BAD[-1]) + 1] += 6 * direction
        attention = made.model.layers[0].self_attn
        for weight in (attention.q_proj.weight, attention.v_proj.weight, attention.o_proj.weight):
            weight.zero_()  # it attends to all alike
        attention.v_proj.weight[0] = direction
        attention.o_proj.weight[:, 0] = 8 * direction
        for layer in made.model.layers[1:]:  # what else differs between the words stays far below what ends a search
            layer.self_attn.o_proj.weight.mul_(0.25)
        head -= (head @ direction)[:, None] * direction
        head[SORRY] += 6 * direction
    return made, direction


def folder(path: Path) -> Path:
    """Model and tokenizer, saved."""
    model()[0].save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def prompts(words: list[str], count: int = 40, seed: int = 0) -> list[str]:
    """Different ones of five words."""
    drawn = random.Random(seed)
    return [" ".join(drawn.sample(words, 5)) for _ in range(count)]


def files(path: Path) -> dict[str, Path]:
    """A set of each kind, as JSON lines and as text."""
    made = {"harmful": path / "bad.jsonl", "harmless": path / "good.txt"}
    made["harmful"].write_text("\n".join(json.dumps({"prompt": p}) for p in prompts(BAD)))
    made["harmless"].write_text("\n".join(prompts(GOOD)))
    return made

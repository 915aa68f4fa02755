"""What mergekit makes of three tiny models, for test_recipe.py. In an environment that has it:

python tests/merging/record_mergekit.py tests/merging/mergekit.safetensors
"""

import math
import sys
import tempfile
from pathlib import Path

import torch
import yaml

SIZES = dict(
    hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=16, max_position_embeddings=16, tie_word_embeddings=False,
)  # fmt: skip

TWO = [{"model": "a", "parameters": {"weight": 0.7, "density": 0.4}},
       {"model": "b", "parameters": {"weight": -0.2, "density": 0.8}}]  # fmt: skip
BY_LAYER = [{"filter": "self_attn", "value": [0.1, 0.9]}, {"filter": "mlp", "value": [0.8, 0.2, 0.4]}, {"value": 0.5}]

RECIPES = {
    "linear": {"merge_method": "linear", "models": [
        {"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": BY_LAYER}}]},
    "slerp": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "a"}],
              "parameters": {"t": BY_LAYER}},
    "slerp of lines": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "base"}, {"model": "line"}],
                       "parameters": {"t": 0.3}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": [
        {"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": -0.2}}],
        "parameters": {"lambda": 0.6}},
    "ties": {"merge_method": "ties", "base_model": "base", "models": TWO, "parameters": {"int8_mask": True}},
    "ties, summed": {"merge_method": "ties", "base_model": "base", "models": TWO,
                     "parameters": {"normalize": False, "lambda": 0.5}},
    # nothing is dropped: what is drawn is each program's own
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "dtype": "float32", "models": [
        {"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": 0.2}}],
        "parameters": {"density": 1.0}},
    "dare_linear": {"merge_method": "dare_linear", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}],
                    "parameters": {"weight": 0.5, "normalize": True}},
}  # fmt: skip


def families(path):
    """Models whose weights are sines, the same with every version of torch."""
    import transformers

    for k, name in enumerate(("base", "a", "b", "line")):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        with torch.no_grad():
            for j, (_, p) in enumerate(sorted(model.named_parameters())):
                base, own = (
                    torch.tensor([math.sin(1 + 3.7 * j + f * i * i) for i in range(p.numel())], dtype=torch.float64)
                    for f in (0.37, 0.11 + 0.23 * k)
                )
                p.copy_((1.5 * base if name == "line" else base + (0.3 * own if k else 0)).view_as(p))
        model.save_pretrained(path / name, max_shard_size="5KB" if name == "a" else "1GB")
    return path


def main() -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file, save_file

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        here = families(Path(folder))
        for name, recipe in RECIPES.items():
            text = yaml.safe_dump(recipe)
            for model in ("base", "a", "b", "line"):
                text = text.replace(f"model: {model}\n", f"model: {here / model}\n")
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(here / "out"),
                      options=MergeOptions(copy_tokenizer=False))  # fmt: skip
            merged = {k: t for p in (here / "out").glob("*.safetensors") for k, t in load_file(p).items()}
            found |= {f"{name}/{k}": t.float() for k, t in merged.items()}
            for p in (here / "out").iterdir():
                p.unlink()
    save_file(found, sys.argv[1], {"mergekit": __import__("importlib.metadata").metadata.version("mergekit")})


if __name__ == "__main__":
    main()

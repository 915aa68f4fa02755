"""Find a model's refusal direction, look at how it separates, take it out for a while, and keep it in a file.

    python examples/directions.py --out direction.safetensors
    python examples/directions.py --model PATH --harmful bad.txt --harmless good.txt --out direction.safetensors
    fastguard ablate PATH --directions direction.safetensors --out ablated

Without a model it runs on a random one that tells two kinds of random tokens apart. ``fastguard directions`` is this
with data of any form, splits by similarity, and a page with pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Batch, make_model

from fastguard import directions
from fastguard.directions.select import NoCandidateError


def read_prompts(model: str, file: str, size: int = 16) -> list[Batch]:
    """Batches of prompts in the chat format, up to where the answer begins; a text file with one a line."""
    import transformers

    from fastguard.data.chat import encode_prompt

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = [encode_prompt(tokenizer, line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
    made = [tokenizer.pad({"input_ids": ids[i : i + size]}, return_tensors="pt") for i in range(0, len(ids), size)]
    return [dict(batch) for batch in made]


def random_prompts(low: int, high: int, seed: int) -> list[Batch]:
    """Three batches of random tokens in a range."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(low, high, (16, 8), generator=generator)} for _ in range(3)]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--harmful")
    parser.add_argument("--harmless")
    parser.add_argument("--refusal-token", type=int, default=40, help="id with which refusals begin")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(given)
    if args.model and not (args.harmful and args.harmless):
        parser.error("--model needs --harmful and --harmless")

    model = make_model(args.model).eval()
    if args.model:
        harmful, harmless = (read_prompts(args.model, file) for file in (args.harmful, args.harmless))
    else:
        harmful, harmless = random_prompts(50, 96, 0), random_prompts(3, 50, 1)

    # The first batch of each chooses, the second measures, the others estimate. One forward a batch, without the head.
    means = directions.estimate(model, harmful[2:], harmless[2:], positions=1)
    auc = directions.separation(model, means, harmful[1:2], harmless[1:2])[0]
    print("separation by layer:", " ".join(f"{value:.2f}" for value in auc.tolist()))
    try:
        found = directions.select(model, means, harmful[:1], harmless[:1], refusal_tokens=[args.refusal_token])
        direction, layer = found.direction, found.layer
        print(f"layer {layer}: refusal score {found.harmful:.2f}, without the direction {found.refusal[0, layer]:.2f}")
    except NoCandidateError as error:  # a model that does not refuse has none: take the one that separates best
        layer = int(auc.argmax())
        direction = means.at(-1, layer)
        print(f"{error}; taken: layer {layer}")

    basis = directions.orthonormalise(direction)
    depth = len(auc)
    before = directions.samples(model, harmful, position=-1, layer=depth) @ basis.T
    with directions.ablate(model, basis):
        after = directions.samples(model, harmful, position=-1, layer=depth) @ basis.T
    print(f"part of the stream along it, at the end: {before.abs().mean():.3g}, ablated {after.abs().mean():.3g}")
    means.save(args.out, basis, {"layer": str(layer)})


if __name__ == "__main__":
    main()

"""Frozen entries and trained neurons under Hugging Face's Trainer, which has an optimizer and a schedule of its own."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastguard import saliency
from fastguard.ops.masks import unpack_mask
from saliency.batches import batches
from tiny_models import tiny


def rows():
    return [{k: v[b] for k, v in batch.items()} for batch in batches(4) for b in range(3)]


def trainer(model, tmp_path, **more):
    given = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, weight_decay=0.5, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=1.0, gradient_accumulation_steps=2,
    )  # fmt: skip
    return transformers.Trainer(model, given, train_dataset=rows(), **more)


@pytest.mark.parametrize("lora", [False, True])
def test_frozen_entries_keep_their_bits(lora, tmp_path):
    model = tiny("llama")
    if lora:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    base = model.get_base_model() if lora else model
    wanted = "lora_A" if lora else "self_attn.q_proj"
    names = [n for n, p in base.named_parameters() if wanted in n]
    weights = saliency.weights_of(model)
    before = {n: weights(n).clone() for n in names}
    masks = saliency.at_random(weights, {n: w.numel() // 3 for n, w in before.items()})
    with saliency.freeze(model, masks):
        trainer(model, tmp_path).train()
    for n, w in before.items():
        held = unpack_mask(masks[n], w.shape)
        assert torch.equal(weights(n)[held], w[held])
        assert not (weights(n)[~held] == w[~held]).any()


def test_neurons_alone_are_trained(tmp_path):
    model = tiny("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with saliency.neurons(model, {name: torch.tensor([2, 9])}) as chosen:
        optimizer = torch.optim.AdamW(chosen.parameters(), lr=1e-2)
        trainer(model, tmp_path, optimizers=(optimizer, None)).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name}
    rows_moved = (model.get_parameter(name) != before[name]).any(1).nonzero()[:, 0].tolist()
    assert rows_moved == [2, 9]

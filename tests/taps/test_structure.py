"""The probe: what it finds, what it refuses, and that it leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastguard.taps import find_structure
from fastguard.taps.structure import head_parameters
from tiny_models import ARCHITECTURES, tiny

NORMS = {
    "gpt_neox": "gpt_neox.final_layer_norm",
    "phi": "model.final_layernorm",
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
}
KINDS = {"gemma2": "rms_offset", **dict.fromkeys(("gpt_neox", "phi", "gpt2", "opt", "cohere"), "layer")}
EPS = {"gpt_neox": 1e-5, "phi": 1e-5, "gpt2": 1e-5, "opt": 1e-5, "cohere": 1e-5, "mixtral": 1e-5}
MLPS = {"opt": "fc2"}
ATTENTIONS = {"gpt_neox": "attention", "gpt2": "attn"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_the_parts(name, dtype):
    model = tiny(name, dtype)
    found = find_structure(model)
    names = {module: name for name, module in model.named_modules()}
    assert found.model is model and found.head is model.get_output_embeddings()
    assert len(found.layers) == len(found.mlps) == len(found.attentions) == 3 and found.vocabulary == 97
    assert names[found.norm] == NORMS.get(name, "model.norm")
    assert found.norm_kind == KINDS.get(name, "rms")
    if dtype == torch.float32:
        assert found.norm_eps == EPS.get(name, 1e-6)
    for layer, mlp in zip(found.layers, found.mlps, strict=True):
        assert names[mlp] == f"{names[layer]}.{MLPS.get(name, 'mlp')}"
    for layer, attention in zip(found.layers, found.attentions, strict=True):
        assert names[attention] == f"{names[layer]}.{ATTENTIONS.get(name, 'self_attn')}"
    assert found.softcap == (2.0 if name == "gemma2" else None)
    assert found.scale == pytest.approx({"cohere": 0.25, "granite": 1 / 3}.get(name, 1.0))


class Mixer(nn.Module):
    """A block that is no attention, in an attention's place."""

    def forward(self, hidden_states, **_):
        return hidden_states, None


def test_a_layer_without_attention_leaves_all_attentions_out():
    model = tiny("llama")
    model.model.layers[1].self_attn = Mixer()
    found = find_structure(model)
    assert found.attentions == () and len(found.mlps) == 3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_attentions_under_wrappers(checkpointed):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    model = tiny("llama")
    expected = tuple(layer.self_attn for layer in model.model.layers)
    if checkpointed:
        kind = type(model.model.layers[0])
        apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda m: isinstance(m, kind))
    assert find_structure(Wrapper(model)).attentions == expected


def test_leaves_the_model_as_it_was():
    model = tiny("llama")
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    find_structure(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_unwraps():
    model = tiny("llama")
    for wrapped in (Wrapper(model), torch.compile(model), Wrapper(torch.compile(model))):
        assert find_structure(wrapped).model is model


class Odd(nn.Module):
    """A norm that is none of the known kinds."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return torch.tanh(x) * self.weight


def test_an_unknown_norm_is_called_as_a_module_and_says_so():
    from fastguard import RepNoiseLoss
    from losses.published import published_loss
    from tiny_models import assert_same_gradients, gradients, pair

    model = tiny("llama", torch.float64)
    model.model.norm = Odd(model.model.norm)
    with pytest.warns(UserWarning, match="final norm Odd: neither an RMS nor a layer norm"):
        loss_fn = RepNoiseLoss(model, filter_tol=0.0)
    harmful, harmless = pair()
    loss = loss_fn(harmful=harmful, harmless=harmless)
    loss.backward()
    found = gradients(model)
    parts = loss_fn.structure
    expected, _ = published_loss(
        model, harmful, harmless, loss_fn.last_noise, norm=parts.norm, head=parts.head, mlps=parts.mlps
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(found, gradients(model), 1e-6)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="has no language model head"):
        find_structure(nn.Linear(2, 2))
    headless = tiny("llama")
    headless.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="has no language model head"):
        find_structure(headless)
    loose = tiny("llama")
    loose.model.norm.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    with pytest.raises(ValueError, match="no ModuleList of decoder layers"):
        find_structure(loose)
    odd = tiny("llama")
    odd.lm_head.register_forward_hook(lambda m, args, out: out)
    odd.lm_head.forward = lambda x: nn.functional.linear(x, odd.lm_head.weight) ** 3
    with pytest.raises(ValueError, match="is not a linear map"):
        find_structure(odd)
    bent = tiny("llama")
    bent.register_forward_hook(lambda m, args, out: type(out)(logits=out.logits**3))
    with pytest.raises(ValueError, match="logits are not its head's output"):
        find_structure(bent)
    with torch.device("meta"):
        bare = tiny("llama")
    with pytest.raises(ValueError, match="meta device"):
        find_structure(bare)
    plain = tiny("llama")
    for layer in plain.model.layers:
        layer.attention_mlp = layer.mlp
        del layer.mlp
        layer.mlp = lambda x, inner=layer.attention_mlp: inner(x)
    with pytest.raises(ValueError, match="name it by mlp_of="):
        find_structure(plain)
    named = find_structure(plain, mlp_of=lambda layer: layer.attention_mlp)
    assert named.mlps[0] is plain.model.layers[0].attention_mlp


# --- PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(targets, checkpointing):
    from peft import LoraConfig, get_peft_model

    from fastguard import RepNoiseLoss
    from losses.published import published_loss
    from tiny_models import assert_same_gradients, gradients, pair

    base = tiny("llama", torch.float64)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    harmful, harmless = pair()
    loss = loss_fn(harmful=harmful, harmless=harmless)
    loss.backward()
    found = gradients(model)
    assert found and all("lora" in name for name in found)
    parts = loss_fn.structure
    expected, _ = published_loss(
        model, harmful, harmless, loss_fn.last_noise, norm=parts.norm, head=parts.head, mlps=parts.mlps, beta=0.5
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(found, gradients(model), 1e-6)


def test_a_trained_copy_of_the_head_and_prompt_tuning():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    weight, _ = head_parameters(find_structure(model).head)
    assert weight.requires_grad
    prompted = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt tuning"):
        find_structure(prompted)

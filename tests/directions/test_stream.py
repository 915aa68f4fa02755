"""Ablation, addition and rotation: what the stream is inside, and that nothing is left outside."""

from __future__ import annotations

import contextlib
import functools
import math
import threading

import peft
import pytest
import torch
from torch import nn

from directions.published import ablation
from fastguard.directions import Stream, ablate, add, orthonormalise, rotate
from fastguard.directions.edit import norm_columns
from fastguard.ops.project_out import project_out
from tiny_models import ARCHITECTURES, VOCABULARY, assert_same_gradients, gradients, tiny

IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
FUSED = {"llama", "llama_tied", "qwen3", "mistral", "mixtral", "qwen3_moe", "granite", "gpt2"}


def basis(count: int = 2, dtype: torch.dtype = torch.float64, width: int = 32) -> torch.Tensor:
    return orthonormalise(torch.randn(count, width, dtype=dtype, generator=torch.Generator().manual_seed(11)))


@contextlib.contextmanager
def watched(layers):
    """Every layer's input, and the last one's output, as hooks registered later see them."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    handles.append(layers[-1].register_forward_hook(lambda module, args, output: seen.append(output)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_stream_stays_orthogonal(name, calls):
    """2 L + 1 projections, L of them in the fused op where the layers have the common form."""
    model, q = tiny(name).eval(), basis(dtype=torch.float32)
    with torch.no_grad(), ablate(model, q):
        decoder = model.get_decoder()
        with watched(decoder.layers if hasattr(decoder, "layers") else decoder.h) as seen:
            calls.clear()
            fused = model(input_ids=IDS).logits
    assert len(calls) == (3 if name in FUSED else 0)
    assert len(seen) == 4
    for x in seen:
        assert float((x @ q.mT).abs().max()) < 1e-6 * float(x.abs().max())
    with torch.no_grad(), ablate(model, q, fused=False):
        plain = model(input_ids=IDS).logits
    torch.testing.assert_close(fused, plain, rtol=0, atol=2e-5 * float(plain.abs().max()))
    with torch.no_grad():
        assert float((plain - model(input_ids=IDS).logits).abs().max()) > 1e-3


def edited(model: nn.Module, q: torch.Tensor, scale: float) -> nn.Module:
    """The same of the weights: W - s Q^T Q W at every write, embedding rows likewise."""
    with torch.no_grad():
        e = model.model.embed_tokens.weight
        e -= scale * (e @ q.mT) @ q
        for layer in model.model.layers:
            for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                w -= scale * q.mT @ (q @ w)
    return model


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_equals_edited_weights_and_the_published_hooks(scale):
    q = basis(3)
    expected = edited(tiny("llama", torch.float64).eval(), q, scale)
    model = tiny("llama", torch.float64).eval()
    lengths = torch.tensor([[3.0], [0.1], [20.0]], dtype=torch.float64)
    with torch.no_grad(), ablate(model, lengths * q, scale):
        found = model(input_ids=IDS).logits
        answer = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
        uncached = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=False)
    torch.testing.assert_close(found, expected(input_ids=IDS).logits, rtol=0, atol=1e-6)
    assert torch.equal(answer, uncached)
    assert torch.equal(answer, expected.generate(input_ids=IDS, max_new_tokens=5, do_sample=False))
    if scale == 1:
        with torch.no_grad(), ablate(model, q[0]), contextlib.nullcontext():
            mine = model(input_ids=IDS).logits
        with torch.no_grad(), ablation(model, q[0]):
            torch.testing.assert_close(mine, model(input_ids=IDS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float64), ("mixtral", torch.float32), ("gpt2", torch.float32)]
)
def test_steps_of_generation_run_the_layers_own_forward(name, dtype, calls):
    """One token a forward, behind a cache: no fused op, and what the whole sequence gives in one forward."""
    model, q = tiny(name, dtype).eval(), basis(dtype=dtype)
    decoder = model.get_decoder()
    with torch.no_grad(), ablate(model, q):
        whole = model(input_ids=IDS).logits
        cache = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        calls.clear()
        with watched(decoder.layers if hasattr(decoder, "layers") else decoder.h) as seen:
            step = model(input_ids=IDS[:, -1:], past_key_values=cache).logits[:, -1]
    assert not calls
    for x in seen:
        assert float((x @ q.mT).abs().max()) < (1e-12 if dtype == torch.float64 else 1e-6) * float(x.abs().max())
    torch.testing.assert_close(step, whole[:, -1], rtol=0, atol=2e-5 * float(whole.abs().max()))
    with ablate(model, q):
        calls.clear()
        model(input_ids=IDS[:, :1])
    assert len(calls) == 3  # where gradients are recorded the ops run


@pytest.mark.parametrize("tokens", [9, 1])
def test_norm_preserving_ablation_keeps_the_norm_of_each_write(tokens, calls):
    model, q = tiny("llama", torch.float64).eval(), basis()
    modules = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]

    def record(into):
        def hook(module, args, output):
            into.append(output[0] if isinstance(output, tuple) else output)

        return [module.register_forward_hook(hook) for module in (*modules, model.model.embed_tokens)]

    own, written = [], []
    before = record(own)
    with torch.no_grad(), ablate(model, q, norm_preserving=True), watched(model.model.layers) as seen:
        after = record(written)
        own.clear()  # of what the probe ran
        calls.clear()
        model(input_ids=IDS[:, :tokens])
    for handle in (*before, *after):
        handle.remove()
    assert not calls and len(own) == len(written) == 7
    for x in seen:
        assert float((x @ q.mT).abs().max()) < 1e-12 * float(x.abs().max())
    written[0] = seen[0]  # the embedding's output is projected where the first layer gets it
    for x, y in zip(own, written, strict=True):
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
        left = x - (x @ q.mT) @ q
        torch.testing.assert_close(y, left * (x.norm(dim=-1) / left.norm(dim=-1))[..., None])


def test_norm_columns_is_another_operation_but_for_one_feature():
    """Of W e_j both keep the norm; of W x the edit does not."""
    g = torch.Generator().manual_seed(8)
    weight, q = torch.randn(32, 12, dtype=torch.float64, generator=g), basis()
    edited = norm_columns(weight, q)

    def run_time(written):
        return project_out(written, q, preserve_norm=True)

    torch.testing.assert_close(edited.T, run_time(weight.T))  # its columns, as an embedding's rows are written
    x = torch.randn(5, 12, dtype=torch.float64, generator=g)
    by_edit, by_context = x @ edited.T, run_time(x @ weight.T)
    torch.testing.assert_close(by_context.norm(dim=-1), (x @ weight.T).norm(dim=-1))
    change = by_edit.norm(dim=-1) / (x @ weight.T).norm(dim=-1) - 1
    assert float(change.abs().max()) > 1e-3
    assert float((by_edit @ q.mT).abs().max()) < 1e-12


@pytest.mark.parametrize("fused", [True, False])
def test_each_sample_its_own_basis(fused):
    model, q = tiny("llama", torch.float64).eval(), basis(2)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with ablate(model, q[1]):
            second = model(input_ids=IDS).logits
        with ablate(model, q[:, None], basis_index=torch.tensor([1, -1]), fused=fused):
            mixed = model(input_ids=IDS).logits
    torch.testing.assert_close(mixed[0], second[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[1], plain[1], rtol=0, atol=1e-6)


def traces(model: nn.Module) -> list:
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_put_back(error):
    model = tiny("llama").eval()
    before, logits = traces(model), model(input_ids=IDS).logits
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)  # someone else's
    someone = vars(model.model.layers[1])["forward"]
    with contextlib.suppress(ValueError, KeyboardInterrupt), ablate(model, basis()):
        assert type(model.model.layers[0]) is not before[3][1]
        if error is not None:
            hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
            try:
                model(input_ids=IDS)
            finally:
                hook.remove()
    assert vars(model.model.layers[1])["forward"] is someone
    del model.model.layers[1].forward
    assert traces(model) == before
    assert torch.equal(model(input_ids=IDS).logits, logits)
    with ablate(model, basis()):  # and it can be done again
        assert not torch.equal(model(input_ids=IDS).logits, logits)


def test_an_error_on_entry_leaves_nothing():
    model = tiny("llama").eval()
    before = traces(model)
    for wrong, message in (
        (torch.zeros(32), "no zero row"),
        (torch.ones(31), r"directions: expected \[D\] or \[K, D\] with D = 32, got shape \(31,\)"),
        (torch.full((32,), torch.nan), "directions: expected finite"),
        ("r", "directions: expected a tensor, got str"),
    ):
        with pytest.raises(ValueError, match=message), ablate(model, wrong):
            pass
    with pytest.raises(ValueError, match="scale: expected a finite number"), ablate(model, basis(), math.nan):
        pass
    outside = ablate(model, basis()[:, None], basis_index=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="basis_index: expected -1 to 1, got 0 to 2"), outside:
        pass
    with pytest.raises(ValueError, match="layer: expected 0 to 2, got 3"), add(model, torch.ones(32), 3):
        pass
    assert traces(model) == before


def test_two_contexts_at_once_take_out_both():
    model, q = tiny("llama", torch.float64).eval(), basis(2)
    with torch.no_grad():
        with ablate(model, q):
            both = model(input_ids=IDS).logits
        with ablate(model, q[0]), ablate(model, q[1]):
            nested = model(input_ids=IDS).logits
    torch.testing.assert_close(nested, both, rtol=0, atol=1e-6)


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return wrapped.eval()


def test_adapters_write_nothing_either(calls):
    model, q = lora(tiny("llama", torch.float64)), basis(2)
    with torch.no_grad(), ablate(model, q), watched(model.get_base_model().model.layers) as seen:
        calls.clear()
        model(input_ids=IDS)
    assert len(calls) == 3
    assert all(float((x @ q.mT).abs().max()) < 1e-12 for x in seen)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through(fused, checkpointing):
    """Those of the published hooks, which autograd differentiates; also when layers are computed again."""
    model, q = tiny("llama", torch.float64), basis(1)
    with ablation(model, q[0]):
        expected_loss = loss_of(model)
    expected_loss.backward()
    expected = gradients(model)
    loss_of(model).backward()
    without = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ran = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    with ablate(model, q, fused=fused):
        ran.clear()
        loss = loss_of(model)
        loss.backward()
    assert len(ran) == 1 + checkpointing
    found = gradients(model)
    assert float(abs(loss - expected_loss)) < 1e-6
    assert_same_gradients(found, expected, 1e-5)
    with pytest.raises(AssertionError):  # ablation is no no-op
        assert_same_gradients(found, without, 1e-2)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_backward_after_the_context_is_refused_under_checkpointing(kept, fused):
    model = tiny("llama", torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    stream = Stream(model)
    with stream.ablated(basis(1), fused=fused) if kept else ablate(model, basis(1), fused=fused):
        loss = loss_of(model)
    with pytest.raises(RuntimeError, match="gradients of another function"):
        loss.backward()
    stream.close()


def test_recomputations_in_other_threads_by_any_checkpointer():
    """Autograd runs a backward on a GPU in threads of its own."""
    model, q = tiny("llama", torch.float64), basis(1)
    with ablate(model, q, fused=False):
        loss_of(model).backward()
    expected = gradients(model)
    for layer in model.model.layers:
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    with ablate(model, q):
        loss = loss_of(model)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert_same_gradients(gradients(model), expected, 1e-10)


def test_compiled_models():
    model, q = tiny("llama", num_hidden_layers=1).eval(), basis(1, torch.float32)
    with torch.no_grad(), ablate(model, q):
        expected = model(input_ids=IDS, use_cache=False).logits
    torch._dynamo.reset()
    stream = Stream(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(input_ids=IDS, use_cache=False).logits
        with stream.ablated(q):
            torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected)
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, plain, rtol=0, atol=0)
        with ablate(compiled, q):  # hooks of its own, which compiled code would not see
            torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected)
    with pytest.raises(RuntimeError, match="no forward of the compiled model passed"), Stream(compiled).ablated(q):
        pass
    stream.close()
    torch._dynamo.reset()


def test_addition_is_a_shift_of_one_layers_input():
    model, vector = tiny("llama", torch.float64).eval(), 3 * basis(1)[0]
    layers = model.model.layers
    hook = layers[1].register_forward_pre_hook(lambda module, args: (args[0] - 0.5 * vector, *args[1:]))
    expected = model(input_ids=IDS).logits
    hook.remove()
    with add(model, vector, 1, -0.5):
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rotation_contains_ablation_and_addition():
    model, plane = tiny("llama", torch.float64).eval(), basis(2)
    u, v = plane
    with watched(model.model.layers) as before, torch.no_grad():
        model(input_ids=IDS)
    for angle in (0.3, math.pi / 2):
        with torch.no_grad(), rotate(model, plane, angle), watched(model.model.layers) as seen:
            model(input_ids=IDS)
        for x in seen:
            part = torch.stack([x @ u, x @ v], -1)
            length = part.norm(dim=-1)
            torch.testing.assert_close(part[..., 0], length * math.cos(angle), rtol=0, atol=1e-12)
            torch.testing.assert_close(part[..., 1], length * math.sin(angle), rtol=0, atol=1e-12)
        torch.testing.assert_close(seen[0].norm(dim=-1), before[0].norm(dim=-1))
    assert float((seen[-1] @ u).abs().max()) < 1e-12  # at pi / 2: u is ablated
    with torch.no_grad(), rotate(model, plane, 0.0), watched(model.model.layers) as seen:
        model(input_ids=IDS)
    assert ((seen[0] - before[0]) @ u > 0).all()  # at 0: u is added, as much as the plane holds


def test_layers_that_do_not_add_are_refused():
    model = tiny("llama").eval()
    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match=r"layer 1 \(LlamaDecoderLayer\) does not add"), ablate(model, basis()):
        pass
    hook.remove()


def test_a_multiplied_write_is_not_fused(calls):
    model, q = tiny("granite", residual_multiplier=0.4).eval(), basis(dtype=torch.float32)
    with torch.no_grad(), ablate(model, q), watched(model.model.layers) as seen:
        calls.clear()
        model(input_ids=IDS)
    assert not calls
    assert all(float((x @ q.mT).abs().max()) < 1e-6 * float(x.abs().max()) for x in seen)


def test_a_watched_norm_is_not_passed_by(calls):
    """A layer whose second norm has someone else's hook keeps its own forward."""
    model, seen = tiny("llama").eval(), []
    hook = model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), ablate(model, basis(dtype=torch.float32)):
        calls.clear(), seen.clear()
        model(input_ids=IDS)
    hook.remove()
    assert (len(calls), len(seen)) == (2, 1)

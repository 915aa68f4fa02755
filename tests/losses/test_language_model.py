"""LanguageModelLoss against plain eager transformers in float64: values, every gradient, and what surrounds them."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from checks import assert_catches_spoiled
from fastguard.losses.language_model import LanguageModelLoss, dpo_loss, saved_where_it_lies
from fastguard.ops.representation_distance import representation_distance
from launch import two_processes
from losses.language_model_worker import CASES
from tiny_models import ARCHITECTURES, assert_same_gradients, gradients, tiny

TOLERANCE = 1e-9
MODELS = ["llama", "llama_tied", "gemma2", "phi"]


def batch_of(batch: int = 3, length: int = 9, seed: int = 0, form: str = "labels") -> dict[str, Tensor]:
    """Samples of several lengths; ``form`` says what tells the tokens that carry loss."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (batch, length), generator=g)
    if form == "ids":
        return {"input_ids": ids}
    mask = (torch.arange(length) < length - torch.arange(batch)[:, None] % 3).long()
    made = {"input_ids": ids, "attention_mask": mask}
    if form == "labels":
        made["labels"] = ids.masked_fill((mask == 0) | (torch.arange(length) < 3), -100)
    return made


def labels_of(batch: dict) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, -100)


def outputs(model: nn.Module, batch: dict):
    return model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True, use_cache=False)


def eager(model, batch: dict, kind: str, cut: float = -15.0, positions: str = "all") -> Tensor:
    """The losses from all logits at once, as the published code has them; ``model`` or its outputs."""
    out = outputs(model, batch) if isinstance(model, nn.Module) else model
    logits, labels = out.logits, labels_of(batch)
    read = logits[:, :-1][labels[:, 1:] != -100]
    target = labels[:, 1:][labels[:, 1:] != -100]
    if kind == "cross_entropy":
        return nn.functional.cross_entropy(read, target)
    if kind == "max_entropy":
        log_p = torch.log_softmax(logits.flatten(0, 1) if positions == "all" else read, -1)
        return (log_p.exp() * log_p).sum(-1).mean()
    log_p = torch.log_softmax(read, -1).gather(1, target[:, None])[:, 0]
    loss = -torch.log1p(-log_p.exp())
    return loss.masked_fill(log_p < cut, 0).mean()


def eager_distance(out, references, kind: str, mask: Tensor | None = None) -> Tensor:
    """TAR's: the mean over hidden states of the mean distance of a token."""
    means = []
    for h, r in zip(out.hidden_states, references, strict=True):
        d = (h - r).norm(dim=-1) if kind == "l2" else torch.cosine_similarity(h, r.to(h.dtype), dim=-1, eps=0)
        d = {"l2": d, "cosine": 1 - d, "absolute_cosine": 1 - d.abs()}[kind]
        means.append(d.mean() if mask is None else d[mask].mean())
    return torch.stack(means).mean()


def assert_equal_losses(model: nn.Module, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    found.backward()
    mine = gradients(model)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert_same_gradients(mine, gradients(model), tolerance)


@pytest.mark.parametrize("form", ["labels", "attention_mask", "ids"])
@pytest.mark.parametrize("name", MODELS)
def test_cross_entropy(name, form):
    model = tiny(name, torch.float64)
    batch = batch_of(form=form)
    loss = LanguageModelLoss(model, filter_tol=0.0)(batch)
    assert loss.dtype == torch.float64 and loss.dim() == 0
    assert loss.item() == pytest.approx(model(**{**batch, "labels": labels_of(batch)}).loss.item(), rel=1e-6)
    assert_equal_losses(model, loss, eager(model, batch, "cross_entropy"))


@pytest.mark.parametrize("kind, options", [
    ("max_entropy", {}), ("max_entropy", {"positions": "labels"}), ("log_one_minus_p", {}),
    ("log_one_minus_p", {"cut": -4.5}),
])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_other_losses(name, kind, options):
    model = tiny(name, torch.float64)
    batch = batch_of()
    loss = LanguageModelLoss(model, filter_tol=0.0)(batch, kind, **options)
    assert_equal_losses(model, loss, eager(model, batch, kind, **options))


def test_the_cut_leaves_tokens_out():
    """At -4.5, close to -log 97, some tokens are cut and some are not: the case above tests both."""
    model = tiny("llama", torch.float64)
    batch = batch_of()
    loss_fn = LanguageModelLoss(model)
    values = [loss_fn(batch, "log_one_minus_p", cut=cut).item() for cut in (-15.0, -4.5, 0.0)]
    assert values[0] > values[1] > values[2] == 0.0


def test_nothing_cancels_where_the_model_is_sure():
    """p within 1e-14 of one: log(1 - p) is not what 1 - p makes of it, and its gradient is right."""
    model = tiny("llama", torch.float32)
    batch = batch_of(form="ids")
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    wide = tiny("llama", torch.float64)
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    batch["labels"] = outputs(wide, batch).logits.argmax(-1).roll(1, 1)  # each position's label is its best guess
    loss = LanguageModelLoss(model)(batch, "log_one_minus_p")
    loss.backward()
    logits = outputs(wide, batch).logits[:, :-1]
    target = batch["labels"][:, 1:, None]
    rest = logits.scatter(2, target, -math.inf).logsumexp(-1)
    expected = (logits.logsumexp(-1) - rest).mean()
    expected.backward()
    assert float((logits.logsumexp(-1) - rest).detach().max()) > 20
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model), gradients(wide), 1e-4)


@pytest.mark.parametrize("kind", ["cross_entropy", "max_entropy", "log_one_minus_p"])
def test_spoiled_gradients_are_caught(kind):
    model = tiny("llama", torch.float64)
    batch = batch_of()
    LanguageModelLoss(model)(batch, kind).backward()
    found = gradients(model)
    eager(model, batch, kind).backward()
    expected = gradients(model)
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        reference = expected[name]
        assert_catches_spoiled(
            lambda t, name=name, reference=reference: assert_same_gradients({name: t}, {name: reference}, TOLERANCE),
            found[name],
        )


@pytest.mark.parametrize("name", MODELS)
def test_sequence_logp_and_dpo(name):
    model = tiny(name, torch.float64)
    chosen, rejected = batch_of(seed=1), batch_of(seed=2)
    rejected["labels"][1] = -100  # a sample that has no token to score

    def logp(batch: dict) -> Tensor:
        labels = batch["labels"][:, 1:]
        log_p = torch.log_softmax(outputs(model, batch).logits[:, :-1], -1)
        return torch.where(labels != -100, log_p.gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0], 0).sum(1)

    loss_fn = LanguageModelLoss(model, filter_tol=0.0)
    reference = torch.linspace(-30, -20, 3, dtype=torch.float64), torch.linspace(-24, -26, 3, dtype=torch.float64)
    found = loss_fn.sequence_logp(chosen), loss_fn.sequence_logp(rejected)
    expected = logp(chosen), logp(rejected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=0)
    assert found[1][1] == 0
    margin = (expected[0] - reference[0]) - (expected[1] - reference[1])
    by_hand = -torch.log(1 / (1 + torch.exp(-0.3 * margin))).mean()
    assert_equal_losses(model, dpo_loss(*found, *reference, beta=0.3), by_hand)
    with pytest.raises(ValueError, match="dpo_loss: expected four tensors of one shape"):
        dpo_loss(*found, reference[0][:2], reference[1])


# --- distances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_are_those_of_transformers(name):
    model = tiny(name).eval()
    batch = batch_of(form="attention_mask")
    found = LanguageModelLoss(model).hidden_states(batch)
    expected = outputs(model, batch).hidden_states
    assert len(found) == len(expected) == 4
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs) and not mine.requires_grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["l2", "cosine", "absolute_cosine"])
@pytest.mark.parametrize("name", ["llama_tied", "gemma2"])
def test_distance_to_a_reference(name, kind, masked):
    reference, model = tiny(name, torch.float64, seed=1), tiny(name, torch.float64)
    batch = batch_of()
    states = LanguageModelLoss(reference).hidden_states(batch)
    mask = batch["attention_mask"].bool() if masked else None
    loss_fn = LanguageModelLoss(model, filter_tol=0.0)
    options = dict(distance_to=states, distance_kind=kind, distance_mask=mask)
    loss = loss_fn(batch, distance_weight=2.5, **options)
    out = outputs(model, batch)  # one forward: float64 models norm in float32, where two backwards round twice
    distance = eager_distance(out, states, kind, mask)
    assert loss_fn.components["representation_distance"].item() == pytest.approx(distance.item(), rel=TOLERANCE)
    assert loss_fn.components["distance_per_state"].shape == (4,)
    assert loss_fn.components.keys() == {"loss", "cross_entropy", "representation_distance", "distance_per_state"}
    assert_equal_losses(model, loss, eager(out, batch, "cross_entropy") + 2.5 * distance)
    alone = loss_fn(batch, None, **options)
    assert_equal_losses_but_head(model, alone, eager_distance(outputs(model, batch), states, kind, mask))


def assert_equal_losses_but_head(model: nn.Module, found: Tensor, expected: Tensor) -> None:
    """The head takes no part in a distance: it may have a gradient of zeros or none."""
    found.backward()
    mine = {k: v for k, v in gradients(model).items() if v.any()}
    expected.backward()
    theirs = {k: v for k, v in gradients(model).items() if v.any()}
    assert found.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    assert_same_gradients(mine, theirs, TOLERANCE)


def test_a_model_that_starts_as_its_reference_has_no_distance_and_no_nan():
    model = tiny("llama")
    batch = batch_of()
    loss_fn = LanguageModelLoss(model)
    states = loss_fn.hidden_states(batch)
    loss_fn(batch).backward()
    expected = gradients(model)
    for kind in ("l2", "cosine"):
        loss_fn(batch, distance_to=states, distance_kind=kind, distance_weight=100.0).backward()
        assert loss_fn.components["representation_distance"] == 0
        assert_same_gradients(gradients(model), expected, 1e-7)


def test_references_in_another_dtype_and_asked_for_one_by_one():
    model = tiny("llama", torch.float64)
    batch = batch_of()
    loss_fn = LanguageModelLoss(model)
    states = [s.bfloat16() for s in LanguageModelLoss(tiny("llama", seed=1)).hidden_states(batch)]
    asked = []

    class Streamed:
        def __len__(self):
            return len(states)

        def __getitem__(self, index):
            asked.append(index)
            return states[index]

    loss = loss_fn(batch, None, distance_to=Streamed())
    assert asked == [0, 1, 2, 3]
    assert loss.item() == pytest.approx(eager_distance(outputs(model, batch), states, "l2").item(), rel=TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_a_copied_reference_is_not_kept(kind, masked):
    """The copy goes when the forward is over, and the backward makes it again."""
    a, original = torch.randn(1, 6, 8, requires_grad=True), torch.randn(1, 6, 8)
    mask = torch.arange(6) < 4 if masked else None
    (expected,) = torch.autograd.grad(representation_distance(a, original, mask, kind=kind).sum(), a)
    copy = original.clone()
    with saved_where_it_lies(original, copy):
        distance = representation_distance(a, copy, mask, kind=kind)
    seen = weakref.ref(copy.untyped_storage())
    del copy
    assert seen() is None
    assert torch.equal(torch.autograd.grad(distance.sum(), a)[0], expected)
    kept = original.clone()
    with saved_where_it_lies(kept, kept):  # the same tensor is saved as it is
        distance = representation_distance(a, kept, mask, kind=kind)
    seen = weakref.ref(kept.untyped_storage())
    del kept
    assert seen() is not None


# --- what surrounds a model -----------------------------------------------------------------------------------


def every_loss(loss_fn: LanguageModelLoss, states, model: nn.Module | None = None) -> Tensor:
    """Four tapped forwards before one backward, of two shapes."""
    first, second = batch_of(seed=3), batch_of(batch=2, length=11, seed=4)
    return (
        loss_fn(first, distance_to=states, model=model)
        + 2 * loss_fn(second, "max_entropy", model)
        + 3 * loss_fn(second, "log_one_minus_p", model=model)
        - 0.1 * loss_fn.sequence_logp(first, model).square().mean()
    )


def reference_states() -> tuple[Tensor, ...]:
    return LanguageModelLoss(tiny("llama", torch.float64, seed=5)).hidden_states(batch_of(seed=3))


def by_hand(model: nn.Module, states) -> Tensor:
    first, second = batch_of(seed=3), batch_of(batch=2, length=11, seed=4)
    labels, out = first["labels"][:, 1:], outputs(model, first)
    log_p = torch.log_softmax(outputs(model, first).logits[:, :-1], -1)
    logp = torch.where(labels != -100, log_p.gather(2, labels.clamp_min(0)[:, :, None])[:, :, 0], 0).sum(1)
    return (
        eager(out, first, "cross_entropy") + eager_distance(out, states, "l2")
        + 2 * eager(model, second, "max_entropy") + 3 * eager(model, second, "log_one_minus_p")
        - 0.1 * logp.square().mean()
    )  # fmt: skip


def by_transformers(model: nn.Module, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_calls_before_one_backward(reentrant):
    """Under transformers' checkpoints of either form: the taps lie outside of them, at the layers' ends."""
    model = tiny("llama", torch.float64)
    loss_fn = LanguageModelLoss(model, filter_tol=0.0)
    if reentrant is not None:
        by_transformers(model, reentrant)
    states = reference_states()
    assert_equal_losses(model, every_loss(loss_fn, states), by_hand(model, states))


def test_beside_another_loss_with_taps():
    from fastguard import RepNoiseLoss
    from tiny_models import pair

    model = tiny("llama", torch.float64)
    by_transformers(model, False)
    harmful, harmless = pair()
    other = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    other(harmful=harmful, harmless=harmless).backward()
    expected = gradients(model)
    loss_fn, states = LanguageModelLoss(model), reference_states()
    by_hand(model, states).backward()
    expected = {name: g + expected[name] for name, g in gradients(model).items()}
    other.call.zero_()
    (every_loss(loss_fn, states) + other(harmful=harmful, harmless=harmless)).backward()
    assert_same_gradients(gradients(model), expected, TOLERANCE)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_lora(targets):
    from peft import LoraConfig, get_peft_model

    base = tiny("llama", torch.float64)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    loss_fn = LanguageModelLoss(model, filter_tol=0.0)
    with model.disable_adapter():  # the reference is the model without its adapter
        states = loss_fn.hidden_states(batch_of(seed=3))
    assert all(
        torch.equal(a, b)
        for a, b in zip(states, LanguageModelLoss(tiny("llama", torch.float64)).hidden_states(batch_of(seed=3)))
    )
    assert_equal_losses(model, every_loss(loss_fn, states, model), by_hand(model, states))


def test_compiled():
    """A whole graph with checkpoints, compiled once whatever batch and references it is given."""
    torch._dynamo.reset()
    one = dict(dtype=torch.float64, num_hidden_layers=1)
    model, batch = tiny("llama", **one), batch_of()
    states = [LanguageModelLoss(tiny("llama", seed=seed, **one)).hidden_states(batch) for seed in (5, 6)]
    by_transformers(model, False)
    loss_fn = LanguageModelLoss(torch.compile(model, backend="aot_eager", fullgraph=True), filter_tol=0.0)
    loss = loss_fn(batch, "max_entropy", distance_to=states[0])
    out = outputs(model, batch)
    assert_equal_losses(model, loss, eager(out, batch, "max_entropy") + eager_distance(out, states[0], "l2"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss_fn(batch_of(seed=1), "max_entropy", distance_to=states[1]).backward()


def test_compiled_before_the_loss_was_constructed():
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=1)
    wrapped = torch.compile(model, backend="aot_eager")
    batch = batch_of(form="ids")
    none = torch.empty(0, dtype=torch.int64)  # as a loss calls it: else it would be compiled anew, with taps
    wrapped(**batch, logits_to_keep=none, use_cache=False)
    loss_fn = LanguageModelLoss(wrapped)
    for call in (loss_fn, loss_fn.sequence_logp):
        with pytest.raises(RuntimeError, match=r"LanguageModelLoss: .* before the first call of a compiled model"):
            call(batch)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_equal_one(tmp_path):
    two_processes(Path(__file__).with_name("language_model_worker.py"), tmp_path, passes=CASES)


def test_a_frozen_head_and_norm():
    model = tiny("llama", torch.float64)
    for module in (model.lm_head, model.model.norm, model.model.embed_tokens):
        module.weight.requires_grad_(False)
    states = reference_states()
    assert_equal_losses(model, every_loss(LanguageModelLoss(model), states), by_hand(model, states))


def test_a_call_without_gradients():
    model = tiny("llama")
    loss_fn = LanguageModelLoss(model)
    with torch.no_grad():
        quiet = [loss_fn(batch_of()), loss_fn.sequence_logp(batch_of())]
    assert not any(value.requires_grad for value in quiet)
    assert quiet[0].item() == loss_fn(batch_of()).item()
    assert torch.equal(quiet[1], loss_fn.sequence_logp(batch_of()).detach())


def test_a_model_without_logits_to_keep():
    model = tiny("llama", torch.float64)
    whole = type(model).forward

    def forward(input_ids, attention_mask=None, use_cache=None):
        return whole(model, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = forward
    with pytest.warns(UserWarning, match="has no logits_to_keep"):
        loss_fn = LanguageModelLoss(model)
    loss = loss_fn(batch_of())
    del model.forward
    assert_equal_losses(model, loss, eager(model, batch_of(), "cross_entropy"))


@pytest.mark.parametrize("kind", ["cross_entropy", "max_entropy", "log_one_minus_p"])
def test_bfloat16(kind):
    model = tiny("llama", torch.bfloat16)
    batch = batch_of()
    loss = LanguageModelLoss(model)(batch, kind)
    loss.backward()
    found = gradients(model)
    eager(model, batch, kind).backward()
    peer = gradients(model)
    wide = model.double()
    expected = eager(wide, batch, kind)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for name, reference in gradients(wide).items():
        error = float((found[name].double() - reference).norm() / reference.norm())
        allowed = 2 * float((peer[name].double() - reference).norm() / reference.norm()) + 2**-7
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


# --- what it holds and leaves behind --------------------------------------------------------------------------


def test_no_logits_of_every_token_are_made():
    """Nothing of B T V elements comes to be, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    model = tiny("llama", vocab_size=4096)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.shape[-1:] == (4096,) and leaf.numel() > 4096:
                    largest.append((func, tuple(leaf.shape)))
            return out

    batch = batch_of(batch=8, length=64)
    loss_fn = LanguageModelLoss(model, filter_tol=0.0)
    with Watch():
        for kind in ("cross_entropy", "max_entropy", "log_one_minus_p"):
            loss_fn(batch, kind).backward()
    rows = max((math.prod(shape[:-1]) for _, shape in largest), default=0)
    assert rows <= 128  # a tile, of 8 x 64 positions
    with Watch():
        model(**batch)
    assert max(math.prod(shape[:-1]) for _, shape in largest) == 8 * 64, "the watch does not see logits"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_graph_is_freed(checkpointing):
    model = tiny("llama")
    if checkpointing:
        by_transformers(model, False)
    loss_fn = LanguageModelLoss(model)
    batch = batch_of()
    states = loss_fn.hidden_states(batch)
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            loss = loss_fn(batch, distance_to=states)
            if backward:
                loss.backward()
            del loss
            assert seen.pop()() is None
    finally:
        gc.enable()
        hook.remove()


def test_close_and_a_lost_loss_remove_every_hook():
    model = tiny("llama")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    loss_fn = LanguageModelLoss(model)
    assert hooks() == 4
    loss_fn.close()
    assert hooks() == 0
    loss_fn = LanguageModelLoss(model)
    del loss_fn
    gc.collect()
    assert hooks() == 0


def test_a_forward_that_raises_leaves_nothing_behind():
    model = tiny("llama", torch.float64)
    loss_fn = LanguageModelLoss(model)
    batch = batch_of()
    states = loss_fn.hidden_states(batch)

    def explode(*_):
        raise RuntimeError("layer 2 is out")

    hook = model.model.layers[2].register_forward_pre_hook(explode)
    for call in (loss_fn, loss_fn.sequence_logp, loss_fn.hidden_states):
        with pytest.raises(RuntimeError, match="layer 2 is out"):
            call(batch)
    hook.remove()
    assert loss_fn.tapped.taps.scope is None
    assert_equal_losses(model, loss_fn(batch, distance_to=states), eager(model, batch, "cross_entropy"))


# --- errors ---------------------------------------------------------------------------------------------------


def test_nan_is_named():
    model = tiny("llama")
    loss_fn = LanguageModelLoss(model)
    batch = batch_of()
    states = list(loss_fn.hidden_states(batch))
    states[2] = torch.full_like(states[2], math.nan)
    with pytest.raises(FloatingPointError, match=r"LanguageModelLoss: distance of hidden state 2 \(of 0 to 3\) is nan"):
        loss_fn(batch, distance_to=states)
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    for kind in ("cross_entropy", "max_entropy", "log_one_minus_p"):
        with pytest.raises(FloatingPointError, match=f"LanguageModelLoss: {kind} is nan"):
            loss_fn(batch, kind)
    with pytest.raises(FloatingPointError, match="sequence_logp of sample 0 is nan"):
        loss_fn.sequence_logp(batch)


def test_what_filter_tol_means():
    """What it means to lm_head_stats: 0, the default, is exact, None the default of the dtype."""
    model = tiny("llama", vocab_size=512)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # peaked, so that there is something to leave out
    found = []
    for options in ({}, {"filter_tol": 0.0}, {"filter_tol": 0.05}, {"filter_tol": None}):
        LanguageModelLoss(model, **options)(batch_of()).backward()
        found.append(gradients(model)["lm_head.weight"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not torch.equal(found[1], found[2])
    with pytest.raises(ValueError, match="filter_tol: expected 0 <= filter_tol < 1 or None, got 1"):
        LanguageModelLoss(model, filter_tol=1)


def test_what_it_refuses():
    model = tiny("llama")
    loss_fn = LanguageModelLoss(model)
    batch = batch_of()
    states = loss_fn.hidden_states(batch)
    wrong = {
        "kind: expected one of cross_entropy": dict(kind="entropy"),
        "kind: expected a loss": dict(kind=None),
        "positions: expected one of all, labels": dict(positions="some"),
        "distance_kind: expected one of l2": dict(distance_to=states, distance_kind="l1"),
        "distance_to: expected 4 hidden states, got 3": dict(distance_to=states[1:]),
        r"distance_to\[0\]: expected the shape": dict(distance_to=[s[:2] for s in states]),
        "distance_mask: expected bool": dict(distance_to=states, distance_mask=batch["attention_mask"]),
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            loss_fn(batch, **options)
    for call in (loss_fn, loss_fn.sequence_logp):
        with pytest.raises(ValueError, match="batch: expected input_ids"):
            call({})
        with pytest.raises(ValueError, match="batch: no token carries loss"):
            call({**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert torch.isfinite(loss_fn(batch))

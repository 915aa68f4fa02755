"""RepNoiseLoss against the published loss, its options, its errors and what it leaves behind."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import fastguard
from checks import assert_catches_spoiled
from fastguard import RepNoiseLoss
from losses.published import masked_ce, published_loss
from tiny_models import assert_same_gradients, gradients, pair, tiny, transform

TOLERANCE = 1e-6


def published(
    model: nn.Module, loss_fn: RepNoiseLoss, harmful: dict, harmless: dict, after=None, **options
) -> tuple[Tensor, dict]:
    """The eager loss on the noise of the last fused call, the model's parts named by the test."""
    parts = loss_fn.structure
    after = transform(model) if after is None else after
    return published_loss(
        model, harmful, harmless, loss_fn.last_noise, norm=parts.norm,
        head=lambda h: after(model.get_output_embeddings()(h)), mlps=parts.mlps,
        alpha=loss_fn.alpha, beta=loss_fn.beta, **options,
    )  # fmt: skip


def assert_equals_published(
    model: nn.Module, loss_fn: RepNoiseLoss, harmful: dict, harmless: dict, tolerance: float = TOLERANCE, **options
) -> None:
    loss = loss_fn(harmful=harmful, harmless=harmless)
    loss.backward()
    found = gradients(model)
    expected, parts = published(model, loss_fn, harmful, harmless, **options)
    expected.backward()
    assert float((loss - expected).abs().detach()) <= tolerance * float(expected.detach().abs())
    for name, value in parts.items():
        torch.testing.assert_close(loss_fn.components[name], value, rtol=tolerance, atol=0)
    assert_same_gradients(found, gradients(model), tolerance)


@pytest.mark.parametrize(
    "name",
    ["llama", "llama_tied", "qwen3", "mistral", "gemma2", "phi", "gpt_neox", "mixtral", "qwen3_moe", "cohere",
     "granite", "opt", "gpt2"],
)  # fmt: skip
def test_equals_the_published_loss(name):
    model = tiny(name, torch.float64)
    loss_fn = RepNoiseLoss(model, alpha=1.5, beta=0.7, filter_tol=0.0)
    assert loss_fn.structure.norm_kind is not None
    assert_equals_published(model, loss_fn, *pair())


@pytest.mark.parametrize("name", ["opt", "gpt2"])  # whose norms are in float64; an RMS norm is in float32
def test_float64_throughout(name):
    """The constants of boundary labels too, as pair() has them."""
    model = tiny(name, torch.float64, attn_implementation="sdpa")
    loss_fn = RepNoiseLoss(model, alpha=1.5, beta=0.7, filter_tol=0.0)
    assert_equals_published(model, loss_fn, *pair(padding=True), tolerance=1e-12)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_a_lens_without_the_transform_of_the_models_logits(name):
    """As the published code reads hidden states, which the paper's models do not tell apart."""
    model = tiny(name, torch.float64)
    loss_fn = RepNoiseLoss(model, alpha=1.5, beta=0.7, filter_tol=0.0, lens_transform="none")
    assert_equals_published(model, loss_fn, *pair(), after=lambda z: z)
    with_it = RepNoiseLoss(model, alpha=1.5, beta=0.7, filter_tol=0.0)
    with_it(harmful=pair()[0], harmless=pair()[1])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(with_it.components["harmful_ce"][1:], loss_fn.components["harmful_ce"][1:])
    torch.testing.assert_close(with_it.components["harmful_ce_output"], loss_fn.components["harmful_ce_output"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_carries_loss_as_published(attention):
    model = tiny("llama", torch.float64, attn_implementation=attention)
    assert_equals_published(model, RepNoiseLoss(model, beta=0.5, filter_tol=0.0), *pair(padding=True))


def test_one_sample():
    model = tiny("llama", torch.float64)
    assert_equals_published(model, RepNoiseLoss(model, beta=0.5, filter_tol=0.0), *pair(batch=1))


def test_spoiled_gradients_are_caught():
    model = tiny("llama", torch.float64)
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    harmful, harmless = pair()
    loss_fn(harmful=harmful, harmless=harmless).backward()
    found = gradients(model)
    published(model, loss_fn, harmful, harmless)[0].backward()
    expected = gradients(model)
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        reference = expected[name]
        assert_catches_spoiled(
            lambda t, name=name, reference=reference: assert_same_gradients({name: t}, {name: reference}, TOLERANCE),
            found[name],
        )


def test_every_term_reaches_the_gradient():
    """Equality with the published loss would not show a term that is negligible at these weights; this does."""
    model = tiny("llama", torch.float64)
    harmful, harmless = pair()
    results = {}
    for alpha, beta in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        with_loss(model, harmful, harmless, alpha=alpha, beta=beta)
        results[alpha, beta] = gradients(model)["model.layers.0.mlp.down_proj.weight"]
    for a, b in itertools.combinations(results.values(), 2):
        assert float((a - b).norm()) > 1e-2 * float(a.norm())


def with_loss(model: nn.Module, harmful: dict, harmless: dict, backward: bool = True, **options) -> dict:
    loss_fn = RepNoiseLoss(model, filter_tol=0.0, **options)
    loss = loss_fn(harmful=harmful, harmless=harmless)
    if backward:
        loss.backward()
    loss_fn.close()
    return loss_fn.components


# --- options -------------------------------------------------------------------------------------------------


def test_mask_padding_leaves_padding_out():
    model = tiny("llama", torch.float64)
    harmful, harmless = pair(padding=True)
    parts = with_loss(model, harmful, harmless, mask_padding=True, backward=False)
    differ = harmful["input_ids"] != harmless["input_ids"]
    for half, batch, found in (
        ("harmless", harmless, parts["harmless_ce"]),
        ("harmful", harmful, parts["harmful_ce"][0]),
    ):
        mask = (differ & batch["attention_mask"].bool()).long()
        expected = masked_ce(model(**batch).logits, batch["input_ids"], mask)
        assert found.item() == pytest.approx(expected.item(), rel=TOLERANCE), half
    published_parts = with_loss(model, harmful, harmless, backward=False)
    assert float(abs(published_parts["harmful_ce"][0] - parts["harmful_ce"][0])) > 1e-4


def test_mask_from_labels():
    model = tiny("llama", torch.float64)
    harmful, harmless = pair()
    for batch in (harmful, harmless):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :5] = -100
    parts = with_loss(model, harmful, harmless, mask="labels", backward=False)
    ids = {k: v for k, v in harmful.items() if k != "labels"}
    mask = (harmful["labels"] != -100).long()
    expected = masked_ce(model(**ids).logits, harmful["input_ids"], mask)
    assert parts["harmful_ce"][0].item() == pytest.approx(expected.item(), rel=TOLERANCE)


def test_predicted_boundary_and_token_zero_give_plain_cross_entropy():
    model = tiny("llama", torch.float64)
    harmful, harmless = pair()
    options = dict(boundary="predicted", ignore_token_zero=False)
    parts = with_loss(model, harmful, harmless, backward=False, **options)
    differ = harmful["input_ids"] != harmless["input_ids"]
    labels = harmful["input_ids"].masked_fill(~differ, -100)[:, 1:]
    logits = model(**harmful).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert parts["harmful_ce"][0].item() == pytest.approx(expected.item(), rel=TOLERANCE)


def test_last_hidden_state_normed_once():
    model = tiny("llama", torch.float64)
    parts = with_loss(model, *pair(), norm_last_twice=False)
    assert float(parts["harmful_ce"][-1]) == pytest.approx(float(parts["harmful_ce"][0]), rel=1e-12)
    twice = with_loss(model, *pair())
    assert float(abs(twice["harmful_ce"][-1] - twice["harmful_ce"][0])) > 1e-4


def test_retain_batch_of_another_shape():
    model = tiny("llama", torch.float64)
    harmful, harmless = pair()
    ids = torch.randint(1, 97, (2, 13))
    retain = {"input_ids": ids, "attention_mask": (torch.arange(13) < torch.tensor([[13], [7]])).long()}
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0, retain_weight=3.0)
    loss = loss_fn(harmful=harmful, harmless=harmless, retain=retain)
    loss.backward()
    found = gradients(model)
    expected, _ = published(model, loss_fn, harmful, harmless)
    labels = ids.masked_fill(retain["attention_mask"] == 0, -100)
    logits = model(**retain).logits[:, :-1].flatten(0, 1)  # the model's own loss rounds them to float32
    expected = expected + 3.0 * nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
    assert_same_gradients(found, gradients(model), TOLERANCE)
    with_labels = {**retain, "labels": labels}
    loss_fn(harmful=harmful, harmless=harmless, retain=with_labels, retain_weight=0.0)
    assert float(loss_fn.components["retain_ce"]) == pytest.approx(model(**with_labels).loss.item(), rel=TOLERANCE)


def test_sampled_layers_are_unbiased():
    """Each hidden state is read equally often, and one step's sum is weighted by (L + 1) / k."""
    model = tiny("llama", torch.float64)
    harmful, harmless = pair()
    every = with_loss(model, harmful, harmless, backward=False)
    loss_fn = RepNoiseLoss(model, alpha=1.0, beta=0.0, filter_tol=0.0, layers=2)
    counts = torch.zeros(4)
    for step in range(200):
        counts[sorted(loss_fn._drawn_entries())] += 1
        if step < 3:
            loss = loss_fn(harmful=harmful, harmless=harmless)
            parts = loss_fn.components
            read = ~parts["harmful_ce"][1:].isnan()
            assert int(read.sum()) == 2
            torch.testing.assert_close(parts["harmful_ce"][1:][read], every["harmful_ce"][1:][read])
            estimate = parts["harmful_ce"][0] + parts["harmful_ce"][1:].nansum() * 4 / 2
            expected = parts["harmless_ce"] - torch.log(estimate / 4 + 1)
            torch.testing.assert_close(loss, expected)
        else:
            loss_fn.call += 1
    assert bool(((counts - 100).abs() < 4 * math.sqrt(200 * 0.25)).all()), counts


def test_output_alpha_adds_the_output_ascent():
    model = tiny("llama", torch.float64)
    harmful, harmless = pair()
    plain, more = RepNoiseLoss(model, filter_tol=0.0), RepNoiseLoss(model, filter_tol=0.0, output_alpha=2.0)
    difference = more(harmful=harmful, harmless=harmless) - plain(harmful=harmful, harmless=harmless)
    assert difference.item() == pytest.approx(-2 * math.log1p(plain.components["harmful_ce"][0].item()), rel=1e-9)
    difference.backward()
    assert any(float(g.abs().max()) > 0 for g in gradients(model).values())


def test_default_filter_is_close():
    model = tiny("llama", torch.float32)
    harmful, harmless = pair()
    exact, default = RepNoiseLoss(model, filter_tol=0.0), RepNoiseLoss(model)
    losses = []
    for loss_fn in (exact, default):
        losses.append(loss_fn(harmful=harmful, harmless=harmless))
        losses[-1].backward()
        losses.append(gradients(model))
    assert losses[0].item() == pytest.approx(losses[2].item(), rel=1e-6)
    assert_same_gradients(losses[3], losses[1], 3e-2)


def test_bfloat16():
    model = tiny("llama", torch.bfloat16)
    harmful, harmless = pair()
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    loss = loss_fn(harmful=harmful, harmless=harmless)
    loss.backward()
    found = gradients(model)
    published(model, loss_fn, harmful, harmless)[0].backward()
    peer = gradients(model)
    wide = model.double()
    expected, _ = published(wide, loss_fn, harmful, harmless)
    expected.backward()
    truth = gradients(wide)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for name, reference in truth.items():
        error = float((found[name].double() - reference).norm() / reference.norm())
        allowed = 2 * float((peer[name].double() - reference).norm() / reference.norm()) + 2**-7
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def test_autocast():
    """Parameters in float32, products in bfloat16: a head wider than the activations it reads, checkpoints too."""
    harmful, harmless = pair()
    results = []
    for enabled in (False, True):
        model = tiny("llama")
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_fn(harmful=harmful, harmless=harmless)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-2)
    assert_same_gradients(results[1][1], results[0][1], 5e-2)


# --- what it holds and leaves behind --------------------------------------------------------------------------


def test_model_is_not_a_submodule():
    model = tiny("llama").eval()
    loss_fn = RepNoiseLoss(model)
    assert not list(loss_fn.parameters()) and list(loss_fn.state_dict()) == ["call"]
    loss_fn.train()
    assert not model.training and not model.model.layers[0].mlp.training


def test_the_noise_counter_is_state():
    model = tiny("llama")
    harmful, harmless = pair()
    first = RepNoiseLoss(model, beta=1.0)
    values = [first(harmful=harmful, harmless=harmless).item() for _ in range(3)]
    assert len(set(values)) == 3
    second = RepNoiseLoss(model, beta=1.0)
    second.call.fill_(2)
    third = RepNoiseLoss(model, beta=1.0, seed=7)
    third.load_state_dict(second.state_dict())
    assert second(harmful=harmful, harmless=harmless).item() == values[2]
    assert third(harmful=harmful, harmless=harmless).item() != values[2]
    torch.testing.assert_close(first.last_noise(1), second.last_noise(1), rtol=0, atol=0)
    assert not torch.equal(second.last_noise(0), second.last_noise(1))


def test_evaluations_leave_training_as_it_was():
    """Figures, counter, drawn layers and every weight; from a state_dict taken in between, too."""
    (a, b), (c, d) = pair(), pair(seed=4)
    results = []
    for evaluated in (False, True):
        model = tiny("llama")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loss_fn = RepNoiseLoss(model, beta=0.5, layers=2)
        figures = []
        for step in range(4):
            loss_fn(harmful=a, harmless=b).backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluated:
                before = dict(loss_fn.components)
                model.eval()
                with torch.no_grad():
                    values = [loss_fn(harmful=c, harmless=d).item() for _ in range(2)]
                model.train()
                assert values[0] == values[1] == loss_fn.evaluation["loss"].item()
                assert loss_fn.components == before
            figures.append(loss_fn.components)
            if evaluated and step == 1:  # resumed
                state = loss_fn.state_dict()
                loss_fn = RepNoiseLoss(model, beta=0.5, layers=2)
                loss_fn.load_state_dict(state)
        assert int(loss_fn.call) == 4
        results.append((figures, {name: p.detach() for name, p in model.named_parameters()}))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1)) for name in one)
    assert all(torch.equal(p, results[1][1][name]) for name, p in results[0][1].items())


def test_figures_for_a_log():
    model = tiny("llama", torch.float64)
    parts = with_loss(model, *pair(), layers=2, backward=False)
    whole = parts["harmful_ce"]
    assert parts["harmful_ce_output"].dim() == parts["harmful_ce_lens"].dim() == 0
    assert parts["harmful_ce_output"] == whole[0]
    torch.testing.assert_close(parts["harmful_ce_lens"], whole[1:].nanmean())


def test_a_call_without_gradients():
    model = tiny("llama")
    harmful, harmless = pair()
    loss_fn = RepNoiseLoss(model, beta=0.5)
    with torch.no_grad():
        quiet = loss_fn(harmful=harmful, harmless=harmless)
    assert not quiet.requires_grad and not loss_fn.components
    loud = loss_fn(harmful=harmful, harmless=harmless)
    assert quiet.item() == loud.item()
    loud.backward()
    assert gradients(model)


def test_a_frozen_head_and_norm():
    model = tiny("llama", torch.float64)
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    loss_fn = RepNoiseLoss(model, beta=0.5, filter_tol=0.0)
    assert_equals_published(model, loss_fn, *pair())


# --- errors ---------------------------------------------------------------------------------------------------


def test_batches_that_do_not_fit():
    loss_fn = RepNoiseLoss(tiny("llama"))
    harmful, harmless = pair()
    shorter = {k: v[:, :-1] for k, v in harmless.items()}
    with pytest.raises(
        ValueError, match=r"harmless: expected input_ids of the shape of harmful \(3, 9\), got \(3, 8\)"
    ):
        loss_fn(harmful=harmful, harmless=shorter)
    with pytest.raises(ValueError, match="harmless: expected the entries of harmful"):
        loss_fn(harmful=harmful, harmless={"input_ids": harmless["input_ids"]})
    with pytest.raises(ValueError, match="harmful: no token carries loss"):
        loss_fn(harmful=harmful, harmless=harmful)
    with pytest.raises(ValueError, match="harmful: expected input_ids"):
        loss_fn(harmful={}, harmless=harmless)
    with pytest.raises(ValueError, match=r"harmless: expected a mapping with input_ids .*, got list"):
        loss_fn(harmful=harmful, harmless=[harmless])
    with pytest.raises(ValueError, match=r"retain: expected a mapping with input_ids .*, got list"):
        loss_fn(harmful=harmful, harmless=harmless, retain=[harmless])
    with pytest.raises(ValueError, match="retain: no token carries loss"):
        loss_fn(harmful=harmful, harmless=harmless, retain={"input_ids": torch.ones(2, 1, dtype=torch.long)})
    assert int(loss_fn.call) == 0
    loss_fn(harmful=harmful, harmless=harmless)


def test_options_out_of_range():
    model = tiny("llama")
    for name, value in (
        ("mask", "all"), ("boundary", "none"), ("lens_transform", "raw"), ("layers", 0), ("layers", 5), ("layers", 1.5),
        ("alpha", -1), ("beta", -1), ("beta", math.nan), ("alpha", "1"), ("retain_weight", -0.5),
        ("output_alpha", math.inf), ("filter_tol", 1.0), ("filter_tol", -0.1), ("seed", 0.5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            RepNoiseLoss(model, **{name: value})
    with pytest.raises(ValueError, match="name: expected one of published, short_run"):
        RepNoiseLoss.preset(model, "best")
    assert RepNoiseLoss.preset(model, "short_run", beta=2.0).output_alpha == 5.0
    with pytest.raises(ValueError, match="retain_weight: expected a finite number >= 0, got -1"):
        RepNoiseLoss(model)(harmful=pair()[0], harmless=pair()[1], retain_weight=-1)


def test_a_preset_with_a_retain_term_needs_a_retain_batch():
    model = tiny("llama")
    harmful, harmless = pair()
    loss_fn = RepNoiseLoss.preset(model, "short_run")
    with pytest.raises(ValueError, match="retain: expected a batch, since this preset weighs one"):
        loss_fn(harmful=harmful, harmless=harmless)
    loss_fn(harmful=harmful, harmless=harmless, retain=harmless)
    loss_fn(harmful=harmful, harmless=harmless, retain_weight=0)
    with torch.no_grad():
        loss_fn(harmful=harmful, harmless=harmless)
    RepNoiseLoss.preset(model, "short_run", retain_weight=0)(harmful=harmful, harmless=harmless)
    RepNoiseLoss.preset(model, "published")(harmful=harmful, harmless=harmless)


@pytest.mark.parametrize(
    "place, message",
    [
        ("model.layers.1.mlp.down_proj", "harmful_ce of hidden state 2|harmless_ce"),
        ("lm_head", "harmless_ce is nan"),
    ],
)
def test_nan_is_named(place, message):
    model = tiny("llama")
    loss_fn = RepNoiseLoss(model)
    with torch.no_grad():
        model.get_submodule(place).weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=message):
        loss_fn(harmful=pair()[0], harmless=pair()[1])


def test_nan_names_the_layer():
    """A hidden state that is not finite, at one layer alone."""
    model = tiny("llama")
    loss_fn = RepNoiseLoss(model)

    def spoil(module, args, output):
        return torch.where(torch.arange(32) == 0, math.inf, output)

    hook = model.model.layers[1].mlp.register_forward_hook(spoil, prepend=True)
    undo = model.model.layers[1].register_forward_hook(lambda m, a, out: out.nan_to_num(0, 0, 0), prepend=True)
    with pytest.raises(FloatingPointError, match="noise of layer 1"):
        loss_fn(harmful=pair()[0], harmless=pair()[1])
    hook.remove()
    undo.remove()
    assert torch.isfinite(loss_fn(harmful=pair()[0], harmless=pair()[1]))


def test_import_is_light():
    assert "RepNoiseLoss" in dir(fastguard)
    with pytest.raises(AttributeError, match="no attribute 'RepNoise'"):
        _ = fastguard.RepNoise

"""Estimation: the published means, in one short forward a batch; the file they are kept in."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from directions.planted import planted, prompts
from directions.published import mean_activations
from fastguard import directions
from fastguard.directions.moments import Moments
from fastguard.edits.basis import read_basis
from tiny_models import tiny


@pytest.fixture(scope="module")
def model():
    return planted()


@pytest.fixture(scope="module")
def found(model):
    return directions.estimate(model[0], prompts(True), prompts(False), positions=3, second=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_published_procedure(dtype):
    model, _ = planted(3, dtype)
    batches = {harmful: prompts(harmful, padding="left") for harmful in (True, False)}
    mine = directions.estimate(model, batches[True], batches[False], positions=4)
    theirs = {h: mean_activations(model, b, list(mine.positions)) for h, b in batches.items()}
    assert mine.difference.dtype == dtype
    assert mine.positions == (-4, -3, -2, -1)
    # float64 models take their norms and their positions' angles in float32
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7
    for a, b in ((mine.harmful, theirs[True]), (mine.harmless, theirs[False])):
        assert float((a - b).norm() / b.norm()) < tolerance
    expected = theirs[True] - theirs[False]
    assert float((mine.difference - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_side_of_the_padding_does_not_matter(name):
    """Learned positions too: a left-padded prompt begins at position 0."""
    model = tiny(name, torch.float64).eval()
    sides = [
        directions.estimate(model, prompts(True, 1, padding=side), prompts(False, 1, padding=side), positions=2)
        for side in ("left", "right")
    ]
    torch.testing.assert_close(sides[0].harmful, sides[1].harmful, rtol=0, atol=1e-10)
    torch.testing.assert_close(sides[0].harmless, sides[1].harmless, rtol=0, atol=1e-10)


def test_a_planted_direction_is_found(model, found):
    cosines = [float(torch.cosine_similarity(found.at(-1, layer), model[1], dim=0)) for layer in range(4)]
    assert cosines[0] > 0.99
    assert min(cosines) > 0.9


def test_one_forward_a_batch_without_head_or_last_layer(model):
    calls = []
    layers = model[0].model.layers
    watched = {"first": layers[0], "last": layers[-1], "norm": model[0].model.norm, "head": model[0].lm_head}
    structure = directions.Stream(model[0]).structure
    handles = [m.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, m in watched.items()]
    harmful, harmless = prompts(True), prompts(False)
    directions.estimate(model[0], harmful, harmless, structure=structure)
    assert calls == ["first"] * 4
    calls.clear()
    directions.estimate(model[0], harmful, harmless, structure=structure, last_output=True)
    for handle in handles:
        handle.remove()
    assert calls == ["first", "last"] * 4


def test_moments_and_last_output(model, found):
    more = directions.estimate(model[0], prompts(True), prompts(False), positions=3, last_output=True)
    assert torch.equal(more.harmful[:, :-1], found.harmful)
    assert more.harmful.shape[1] == len(model[0].model.layers) + 1
    rows = []
    hook = model[0].model.layers[2].register_forward_pre_hook(lambda module, args: rows.append(args[0][:, -3:]))
    with torch.no_grad():
        for batch in prompts(True):
            model[0](**batch)
    hook.remove()
    torch.testing.assert_close(found.harmful_square[:, 2], torch.cat(rows).square().mean(0))


def test_streaming_sums_lose_nothing():
    """A million samples far from zero: plain fp32 sums are wrong by more than fp32 can tell."""
    moments = Moments(1, 1)
    rows = torch.full((1000, 1, 2), 1000.1)
    for _ in range(1000):
        moments.add(0, 0, rows)
    assert moments.counts == [1_000_000]
    assert float((moments.mean(0) - rows[0, 0]).abs().max()) <= 1000.1 * 2**-23
    plain = torch.zeros(())
    for _ in range(1000):
        plain += rows[:, 0, 0].sum()
    assert abs(float(plain) / 1e6 - float(rows[0, 0, 0])) > 1000.1 * 2**-23


def test_the_model_is_left_as_it_was():
    model = tiny("llama")  # in training mode
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    directions.estimate(model, prompts(True, 1), prompts(False, 1))
    bad = [{"input_ids": torch.full((2, 9), 10**6)}]
    with pytest.raises(IndexError):
        directions.estimate(model, prompts(True, 1), bad)
    assert all(module.training for module in model.modules())
    assert before == {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(positions=0), "positions: expected how many"),
        (dict(positions=[-1, 2]), "positions: expected negative"),
        (dict(positions=12), "harmful: prompt 0 of a batch has 9 tokens"),
        (dict(harmless=[]), "harmless: expected at least one prompt"),
        (dict(harmful=["text"]), "harmful: expected batches that map"),
        (dict(harmful=[{"input_ids": torch.ones(4, dtype=torch.long)}]), r"harmful: expected input_ids of shape"),
        (
            dict(harmful=[{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[1, 0, 1]])}]),
            "a hole in the attention_mask",
        ),
    ],
)
def test_errors_name_what_was_given(model, change, message):
    given = {"harmful": prompts(True, 1), "harmless": prompts(False, 1), "positions": 1, **change}
    with pytest.raises(ValueError, match=message):
        directions.estimate(model[0], **given)


def test_the_file_holds_everything_and_its_origin(found, tmp_path):
    file = tmp_path / "below" / "directions.safetensors"
    made = dataclasses.replace(found, model_hash="m", data_hash="d")
    made.save(file)
    read = directions.Directions.load(file, model_hash="m", data_hash="d")
    for field in dataclasses.fields(made):
        a, b = getattr(made, field.name), getattr(read, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match="made from another model: model_hash m, expected x"):
        directions.Directions.load(file, model_hash="x")
    with pytest.raises(ValueError, match="made from another data"):
        directions.Directions.load(file, data_hash="x")


def test_one_file_for_means_and_basis(found, tmp_path):
    """What is estimated and what was chosen of it, read by either reader."""
    file = tmp_path / "x.safetensors"
    basis = directions.orthonormalise(found.difference[0, :2])
    found.save(file, basis, {"layer": "1"})
    torch.testing.assert_close(read_basis(file), basis.double(), atol=1e-12, rtol=0)
    assert torch.equal(directions.Directions.load(file).harmful, found.harmful)
    with pytest.raises(ValueError, match=r"about: expected other names than .*, got version"):
        found.save(file, basis, {"version": "2"})
    with pytest.raises(ValueError, match="basis: expected rows of 32 features"):
        found.save(file, basis[:, :8])


def test_files_that_do_not_fit(found, tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        directions.Directions.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        directions.Directions.load(file)
    tensors = {"harmful": found.harmful, "harmless": found.harmless}
    about = {"format": "fastguard.directions", "version": "1", "positions": "[-3, -2, -1]", "counts": "[1, 1]"}
    for change, message in (
        ({"format": "other"}, "holds no directions"),
        ({"version": "2"}, "is of version 2, expected 1"),
        ({"positions": "[-1]"}, "does not fit together"),
        ({"counts": "[1]"}, "does not fit together"),
    ):
        save_file(tensors, file, {**about, **change})
        with pytest.raises(ValueError, match=message):
            directions.Directions.load(file)
    save_file({"harmful": found.harmful}, file, about)
    with pytest.raises(ValueError, match="holds"):
        directions.Directions.load(file)
    save_file({**tensors, "harmless": found.harmless * torch.nan}, file, about)
    with pytest.raises(ValueError, match="not finite"):
        directions.Directions.load(file)


def test_a_direction_that_was_not_read(found):
    with pytest.raises(ValueError, match=r"position: expected one of \[-3, -2, -1\]"):
        found.at(-4, 0)
    with pytest.raises(ValueError, match="layer: expected 0 to 4"):
        found.at(-1, 5)

import shutil

import pytest
import torch

import tiny
from fastguard import models


def test_a_folder_is_loaded_in_the_dtype_asked_for(tmp_path):
    folder = tiny.folder(tmp_path / "m")
    model = models.load_model(folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    tokenizer = models.load_tokenizer(str(folder), plain=True)
    assert tokenizer.padding_side == "right" and tokenizer.pad_token_id == 1


def test_a_saved_model_appears_whole_and_replaces_the_old_one(tmp_path, monkeypatch):
    model, target = tiny.model(), tmp_path / "out" / "immunized"
    models.save_model(model, tiny.tokenizer(), target)
    assert (target / "model.safetensors").is_file() and (target / "tokenizer.json").is_file()
    other = tiny.model(seed=1)
    models.save_model(other, tiny.tokenizer(), target)
    loaded = models.load_model(target, torch.float32)
    assert torch.equal(loaded.model.norm.weight, other.model.norm.weight)
    assert torch.equal(loaded.get_input_embeddings().weight, other.get_input_embeddings().weight)

    def dies(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", dies)
    with pytest.raises(KeyboardInterrupt):
        models.save_model(model, None, target)
    assert [p.name for p in target.parent.iterdir()] == ["immunized"]  # the old one whole, nothing half-made
    assert not (target / "half").exists()


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    folder = tiny.folder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    with pytest.raises(ValueError, match=r"model\.chat_template"):
        models.load_tokenizer(str(folder), plain=True)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        models.load_tokenizer(str(folder))


def test_dtype_choice():
    assert models.pick_dtype("auto", "cpu") == torch.float32
    assert models.pick_dtype("auto", "cuda") == torch.bfloat16
    assert models.pick_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="float16"):
        models.pick_dtype("float16")


def test_the_cache_moves_with_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path))
    target = tmp_path / "SmolLM2-135M-Instruct"
    shutil.copytree(tiny.folder(tmp_path / "m"), target)  # a conversion from an earlier run is used as it is
    assert models.resolve(models.SMOLLM2) == str(target)
    assert models.resolve("some/model") == "some/model"

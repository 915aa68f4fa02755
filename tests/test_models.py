import copy
import os
import shutil

import pytest
import torch

import tiny
from fastguard import methods, models
from fastguard.run import config, pipeline
from methods.batches import make, streams


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
    assert models.pick_dtype("float64") == torch.float64
    with pytest.raises(ValueError, match=r"got 'float16', expected auto, float32, bfloat16, float64"):
        models.pick_dtype("float16")


def test_weights_that_are_trained_stay_in_float32_on_a_gpu(tmp_path, monkeypatch):
    """A device is as good as its name here: what a run picks for a GPU, done on the CPU."""
    assert models.pick_training_dtypes("auto", "cuda") == (torch.float32, torch.bfloat16)
    assert models.pick_training_dtypes("auto", "cpu") == (torch.float32, None)
    assert models.pick_training_dtypes("bfloat16", "cuda") == (torch.bfloat16, None)
    asked = []
    monkeypatch.setattr(models, "pick_device", lambda choice: torch.device("cuda"))
    monkeypatch.setattr(models, "load_model", lambda *given: asked.append(given))
    job = pipeline._Job(config.load("demo"), tmp_path, False, lambda *_: None)
    job.folders = {"base": "folder"}
    job.load("base")
    assert asked == [("folder", torch.float32, "cuda", torch.bfloat16)]
    assert pipeline.environment("cpu", str(job.computes))["dtype"] == "float32, products in bfloat16"


@pytest.mark.parametrize("name", ["repnoise", "tar", "booster", "vaccine", "sft", "crl"])
def test_products_in_bfloat16_move_float32_weights(tmp_path, name):
    model = models.load_model(tiny.folder(tmp_path / "m"), torch.float32, products=torch.bfloat16)
    plain = models.load_model(tmp_path / "m", torch.float32)
    steps = []
    for one in (model, plain):
        method = make(methods.find(name), one)
        figures = method.backward(**method.draw(streams(method.roles)))
        gradients = [p.grad for p in one.parameters() if p.grad is not None]
        assert all(t.dtype == torch.float32 for t in (*one.parameters(), *gradients))
        steps.append((float(figures["loss"]), torch.cat([g.flatten() for g in gradients])))
    assert 0 < abs(steps[0][0] - steps[1][0]) < 0.02 * abs(steps[1][0])
    assert float((steps[0][1] - steps[1][1]).norm()) < 0.1 * float(steps[1][1].norm())


def test_a_model_with_products_in_bfloat16_is_copied_saved_and_generates_as_itself(tmp_path):
    model = models.load_model(tiny.folder(tmp_path / "m"), torch.float32, products=torch.bfloat16)
    ids = torch.arange(3, 9)[None]
    assert model(input_ids=ids).logits.dtype == torch.bfloat16
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not twin(input_ids=ids).logits.any() and model(input_ids=ids).logits.any()
    assert model.generate(ids, max_new_tokens=2).shape == (1, 8)
    models.save_model(model, None, tmp_path / "out")
    assert type(models.load_model(tmp_path / "out", torch.float32)).__name__ == type(model).__name__


def test_the_cache_moves_with_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path))
    target = tmp_path / "SmolLM2-135M-Instruct"
    shutil.copytree(tiny.folder(tmp_path / "m"), target)  # a conversion from an earlier run is used as it is
    assert models.resolve(models.SMOLLM2) == str(target)
    assert models.resolve("some/model") == "some/model"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    for load in (lambda: models.load_model(name, torch.float32), lambda: models.load_tokenizer(name)):
        with pytest.raises(FileNotFoundError, match=rf"model\.name: there is no folder '{name}'"):
            load()


def test_an_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (lambda: models.load_model("no/such", torch.float32), lambda: models.load_tokenizer("no/such")):
        with pytest.raises(FileNotFoundError, match=r"model\.name: there is no folder 'no/such', and no ") as error:
            load()
        one_line(error)
    with pytest.raises(FileNotFoundError, match="no files of a Hugging Face model"):
        models.model_digest("no/such")


def test_a_folder_that_lacks_something(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"model\.name: the folder '{folder}' has no tokenizer that can") as error:
        models.load_tokenizer(str(folder))
    one_line(error)
    weights = (folder / "model.safetensors").read_bytes()
    for spoil, kind in (
        (lambda path: path.write_bytes(weights[:3000]), ValueError),
        (lambda path: path.unlink(), FileNotFoundError),
    ):
        spoil(folder / "model.safetensors")
        with pytest.raises(kind, match=rf"model\.name: the folder '{folder}' has no model that can be") as error:
            models.load_model(folder, torch.float32)
        one_line(error)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        models.model_digest(folder)
    with pytest.raises(ValueError, match=r"model\.name: .*config.json' is a file"):
        models.load_model(folder / "config.json", torch.float32)


def test_parameters_that_would_be_drawn_at_random_are_refused(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 parameters of LlamaForCausalLM, the first model\.layers\.1\.mlp\.up"
    ):
        models.load_model(folder, torch.float32)


def test_devices_and_dtypes_that_are_not_there(folder, monkeypatch):
    assert models.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"model\.device: got 'gpu', expected auto, cpu or cuda"):
        models.load_model(folder, torch.float32, "gpu")
    with pytest.raises(ValueError, match=r"dtype: expected a floating torch\.dtype, got 'float32'"):
        models.load_model(folder, "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"model\.device: got 'cuda', but .*; expected auto or cpu"):
        models.load_model(folder, torch.float32, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert models.pick_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match=r"model\.device: got 'cuda:2', expected cuda:0 to cuda:1"):
        models.pick_device("cuda:2")


def test_a_digest_tells_a_model_that_was_replaced(folder, tmp_path, monkeypatch):
    before = models.model_digest(folder)
    assert len(before) == 64
    reads, read = [], models.hashlib.file_digest
    monkeypatch.setattr(models.hashlib, "file_digest", lambda *a: reads.append(1) or read(*a))
    assert models.model_digest(folder) == before and not reads  # not read twice
    assert models.model_digest(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    (folder / "optimizer.pt").write_bytes(b"beside it")
    (folder / "README.md").write_text("beside it")
    assert models.model_digest(folder) == before
    reads.clear()
    path = folder / "model.safetensors"
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    replaced = models.model_digest(folder)
    assert replaced != before and len(reads) == 1
    path.rename(folder / "other.safetensors")
    assert models.model_digest(folder) not in (before, replaced)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert models.model_digest(folder) not in (before, replaced)

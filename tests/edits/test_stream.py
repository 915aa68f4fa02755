"""Weights changed on disk: byte for byte what is not edited, whole shards or none, taken up, in little memory."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastguard.edits import Edit, source_folder, stream
from fastguard.edits.stream import RECORD, Beside
from fastguard.machine import peak_memory


def shard(path, **tensors):
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def sharded(tmp_path):
    """Three shards, odd dtypes, and everything that lies beside weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    parts = {
        "model-1.safetensors": {"a": torch.randn(5, 3), "odd": torch.tensor([1, 2, 3], dtype=torch.uint8)},
        "model-2.safetensors": {"b": torch.randn(4, 4, dtype=torch.bfloat16), "none": torch.empty(0, 3)},
        "model-3.safetensors": {"c": torch.randn(7, dtype=torch.float64), "n": torch.tensor(3)},
    }
    for name, tensors in parts.items():
        shard(folder / name, **tensors)
    places = {t: name for name, tensors in parts.items() for t in tensors}
    index = {"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (folder / "consolidated.safetensors").write_bytes(b"and again")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


def loaded(folder):
    return {k: t for path in sorted(folder.glob("model*.safetensors")) for k, t in load_file(path).items()}


def doubling(**changes):
    given = dict(name="double", options={"by": 2}, tensors={"a": lambda t: t.mul_(2), "b": lambda t: t.mul_(2)})
    return Edit(**{**given, **changes})


def test_edits_copies_and_leaves_the_rest(sharded, tmp_path):
    out = tmp_path / "deep" / "out"
    before = loaded(sharded)
    done = stream(sharded, out, doubling(copies={"head": "a"}, config={"tie_word_embeddings": False}))
    after = loaded(out)
    assert after.keys() == before.keys() | {"head"}
    for name, t in before.items():
        assert after[name].dtype == t.dtype and torch.equal(after[name], t * 2 if name in "ab" else t), name
    assert torch.equal(after["head"], before["a"])  # as it was before the edit
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["head"] == "model-1.safetensors"
    sizes = sum(t.numel() * t.element_size() for t in after.values())
    assert index["metadata"] == {"total_size": sizes, "kept": "yes"}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama", "tie_word_embeddings": False}
    assert (out / "tokenizer.model").read_bytes() == b"\x00\x01"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert not (out / "pytorch_model.bin").exists() and not (out / "consolidated.safetensors").exists()
    with safe_open(out / "model-1.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    record = json.loads((out / RECORD).read_text())
    assert record["complete"] and record["edit"]["options"] == {"by": 2} and record["source"] == str(sharded)
    assert len({entry["sha256"] for entry in record["shards"].values()}) == 3
    assert (done.shards, done.kept, done.edited) == (3, 0, 2) and done.written == sizes


def test_what_is_unedited_keeps_its_bytes(sharded, tmp_path):
    stream(sharded, tmp_path / "out", Edit("nothing", {}, {}))
    for path in sharded.glob("model-*.safetensors"):
        ours, theirs = (tmp_path / "out" / path.name).read_bytes(), path.read_bytes()
        assert ours[-40:] == theirs[-40:] and loaded(sharded).keys() == loaded(tmp_path / "out").keys()


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_an_interrupted_edit_leaves_whole_shards_and_is_taken_up(sharded, tmp_path, how):
    out = tmp_path / "out"

    def fail(t):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("no space left")

    broken = doubling(tensors={"a": lambda t: t.mul_(2), "b": fail})
    if how == "raise":
        with pytest.raises(OSError, match="no space"):
            stream(sharded, out, broken)
        assert not list(out.glob("*.partial"))
    else:
        child = os.fork()
        if child == 0:
            try:
                stream(sharded, out, broken)
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert list(out.glob("*.partial"))  # that it did die in the middle
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["model-1.safetensors"]
    assert not (out / "config.json").exists()  # so that it does not load
    first = (out / "model-1.safetensors").stat().st_mtime_ns
    done = stream(sharded, out, doubling())
    assert (done.kept, done.shards) == (1, 3) and (out / "model-1.safetensors").stat().st_mtime_ns == first
    assert torch.equal(loaded(out)["b"], loaded(sharded)["b"] * 2) and torch.equal(
        loaded(out)["a"], loaded(sharded)["a"] * 2
    )
    assert not list(out.glob("*.partial"))
    assert stream(sharded, out, doubling()).kept == 3


def test_a_shard_whose_source_or_result_changed_is_done_again(sharded, tmp_path):
    out = tmp_path / "out"
    stream(sharded, out, doubling())
    shard(sharded / "model-2.safetensors", b=torch.ones(4, 4, dtype=torch.bfloat16), none=torch.empty(0, 3))
    assert stream(sharded, out, doubling()).kept == 2
    assert torch.equal(loaded(out)["b"], torch.full((4, 4), 2.0, dtype=torch.bfloat16))
    whole = (out / "model-3.safetensors").read_bytes()
    (out / "model-3.safetensors").write_bytes(whole[:-8])
    assert stream(sharded, out, doubling()).kept == 2
    assert (out / "model-3.safetensors").read_bytes() == whole


def test_what_is_there_is_not_replaced_unasked(sharded, tmp_path):
    out = tmp_path / "out"
    stream(sharded, out, doubling())
    with pytest.raises(FileExistsError, match="another edit"):
        stream(sharded, out, doubling(options={"by": 3}))
    stream(sharded, out, doubling(options={"by": 3}), overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="something else"):
        stream(sharded, tmp_path / "mine", doubling())
    for place in (sharded, tmp_path):
        with pytest.raises(ValueError, match="which is read"):
            stream(sharded, place, doubling(), overwrite=True)
    assert len(loaded(sharded)) == 6


def test_bad_sources_and_edits_are_named(sharded, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"names 1 tensors that .* has not, the first 'z'"):
        stream(sharded, out, doubling(tensors={"z": lambda t: t}))
    with pytest.raises(ValueError, match="adds 'b'"):
        stream(sharded, out, doubling(copies={"b": "a"}))
    with pytest.raises(TypeError, match="odd is stored as U8"):
        stream(sharded, out, doubling(tensors={"odd": lambda t: t}))
    assert not out.exists()
    whole = (sharded / "model-2.safetensors").read_bytes()
    (sharded / "model-2.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model-2.safetensors has .* half of a file"):
        stream(sharded, out, doubling())
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 shards: model-2.safetensors"):
        stream(sharded, out, doubling())
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        stream(sharded, out, doubling())
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        stream(tmp_path / "nowhere", out, doubling())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="merge them first"):
        stream(tmp_path / "adapter", out, doubling())


@pytest.fixture
def beside(tmp_path):
    """The same tensors in one file, `b` under another name and in another dtype."""
    folder = tmp_path / "beside"
    folder.mkdir()
    shard(folder / "model.safetensors", a=torch.randn(5, 3), bb=torch.randn(4, 4), more=torch.ones(1))
    (folder / "config.json").write_text("{}")
    return folder


def adding(beside, **changes):
    def add(t, other):
        t.add_(other)

    other = Beside(source_folder(beside), "called so", {"b": "bb"})
    return Edit("add", {}, {"a": add, "b": add}, **{"beside": {"other": other}, **changes})


def test_an_edit_reads_the_same_tensors_of_another_folder(sharded, beside, tmp_path):
    stream(sharded, tmp_path / "out", adding(beside))
    own, other, after = loaded(sharded), load_file(beside / "model.safetensors"), loaded(tmp_path / "out")
    assert torch.equal(after["a"], own["a"] + other["a"]) and torch.equal(after["b"], own["b"].add_(other["bb"]))
    assert torch.equal(after["c"], own["c"])
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["beside"] == {"other": "called so"} and record["edit"]["beside"] == {"other": {"b": "bb"}}
    read = {name: entry["beside"]["other"] for name, entry in record["shards"].items()}
    assert read["model-1.safetensors"] == hashlib.sha256(other["a"].numpy().tobytes()).hexdigest()
    assert read["model-3.safetensors"] == hashlib.sha256().hexdigest()  # nothing of it was wanted


def test_what_is_beside_is_told_apart_and_checked(sharded, beside, tmp_path):
    out = tmp_path / "out"
    stream(sharded, out, adding(beside))
    assert stream(sharded, out, adding(beside)).kept == 3
    shard(beside / "model.safetensors", a=torch.ones(5, 3), bb=torch.ones(4, 4))
    assert stream(sharded, out, adding(beside)).kept == 0
    assert torch.equal(loaded(out)["a"], loaded(sharded)["a"] + 1)
    shard(beside / "model.safetensors", a=torch.ones(5, 4), bb=torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"names 'a', which is \[5, 3\] in .*; .* has one of \[5, 4\]"):
        stream(sharded, out, adding(beside))
    shard(beside / "model.safetensors", a=torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"names 'b', .* has no such tensor"):
        stream(sharded, out, adding(beside))
    shard(beside / "model.safetensors", a=torch.ones(5, 3), bb=torch.ones(4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="bb is stored as U8"):
        stream(sharded, out, adding(beside))
    shard(beside / "model.safetensors", a=torch.ones(5, 3), bb=torch.ones(4, 4))
    with pytest.raises(ValueError, match="which is read"):
        stream(sharded, beside, adding(beside), overwrite=True)


def test_a_tensor_in_another_dtype_is_what_its_function_returns(sharded, tmp_path):
    edit = Edit("wide", {}, {"b": lambda t: t.double() / 3, "a": lambda t: None}, dtypes={"b": "F64"})
    done = stream(sharded, tmp_path / "out", edit)
    after = loaded(tmp_path / "out")
    assert torch.equal(after["b"], loaded(sharded)["b"].double() / 3) and torch.equal(after["a"], loaded(sharded)["a"])
    sizes = sum(t.nbytes for t in after.values())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes == done.written
    with pytest.raises(TypeError, match=r"expected a tensor \[4, 4\] of F64 for b"):
        stream(sharded, tmp_path / "out2", Edit("wide", {}, {"b": lambda t: t}, dtypes={"b": "F64"}))


def test_a_folder_finds_a_tensor_without_looking_through_all(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    shard(folder / "model.safetensors", **{f"w{i}": torch.full((1,), float(i)) for i in range(2000)})
    (folder / "config.json").write_text("{}")
    source = source_folder(folder)
    assert source.tensors is source.tensors and source.read("w1234").item() == 1234
    with pytest.raises(KeyError, match="z"):
        source.read("z")


def test_a_folder_in_use_is_left_alone(sharded, tmp_path):
    from fastguard.machine import locked

    with locked(tmp_path / "out"), pytest.raises(RuntimeError, match="in use by another run"):
        stream(sharded, tmp_path / "out", doubling())
    assert stream(sharded, tmp_path / "out", doubling()).kept == 0


def test_a_model_of_the_hub_is_taken_from_its_snapshot(sharded, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--lab--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(sharded)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stream("lab/tiny", tmp_path / "out", doubling())
    assert torch.equal(loaded(tmp_path / "out")["a"], loaded(sharded)["a"] * 2)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["source"] == "lab/tiny"
    with pytest.raises(FileNotFoundError, match="no weights of a Hugging Face model"):
        stream("lab/other", tmp_path / "out2", doubling())


def test_the_record_is_no_part_of_the_model(sharded, tmp_path):
    from fastguard.models import model_digest

    stream(sharded, tmp_path / "one", doubling())
    stream(sharded, tmp_path / "two", doubling(), name="called otherwise")
    assert model_digest(tmp_path / "one") == model_digest(tmp_path / "two") != model_digest(sharded)


def test_a_full_disk_is_told_beforehand(sharded, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="GiB free"):
        stream(sharded, tmp_path / "out", doubling())


def _peak_growth(work):
    """Bytes by which a child's resident memory rose at its highest."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not in the child
        status = 1
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            before = int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) * 1024
            work()
            os.write(write, str(peak_memory() - before).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(read) as pipe:
        return int(pipe.read())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_is_that_of_a_tensor_not_of_a_shard(tmp_path):
    from fastguard.directions.edit import orthogonalise

    folder, mib = tmp_path / "model", 2**20
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shard(folder / "model.safetensors", **{f"w{i}": torch.ones(1024, 8 * 1024, dtype=torch.bfloat16) for i in range(6)})
    basis = torch.eye(1, 1024)
    edit = Edit("cut", {}, {f"w{i}": lambda t: orthogonalise(t, basis, out=t) for i in range(2)}, {"head": "w0"})
    orthogonalise(torch.ones(1024, 2048, dtype=torch.bfloat16), basis)  # what the libraries set up once is not counted
    growth = _peak_growth(lambda: stream(folder, tmp_path / "out", edit))
    assert growth < 48 * mib, f"{growth / mib:.0f} MiB; a tensor has 16, the shard 96"

    # and the measure sees what a shard at once costs
    def at_once():
        tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
        assert len(tensors) == 6

    assert _peak_growth(at_once) > 90 * mib

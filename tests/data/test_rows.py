"""Every format gives the same rows, with the numbers and the errors that its owner can act on."""

import builtins
import json

import datasets
import pytest

from fastguard.data.rows import read_rows

ROWS = [{"prompt": f"p{i}", "turns": [{"role": "user", "content": f"c{i}"}], "none": None} for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("rows")
    (at / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS))
    (at / "a.json").write_text(json.dumps(ROWS))
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(str(at / "a.parquet"))
    made.save_to_disk(str(at / "saved"))
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(str(at / "both"))
    return at


@pytest.mark.parametrize(
    ("name", "split", "numbers"),
    [
        ("a.jsonl", None, [1, 3, 5, 7, 9]),
        ("a.json", None, [0, 1, 2, 3, 4]),
        ("a.parquet", None, [0, 1, 2, 3, 4]),
        ("saved", None, [0, 1, 2, 3, 4]),
        ("both", "train", [0, 1, 2, 3, 4]),
    ],
)
def test_formats(folder, name, split, numbers):
    rows = read_rows(str(folder / name), split)
    found = list(rows)
    assert [number for number, _ in found] == numbers and [row for _, row in found] == ROWS
    assert list(rows) == found  # again from the first
    assert name in rows.source and (split or "") in rows.source
    kind, digest = rows.fingerprint.split(":")
    assert kind == ("datasets" if split or name == "saved" else "sha256") and len(digest) >= 16
    place = rows.place(numbers[2])
    assert place.endswith(":5") if name == "a.jsonl" else "row 2 (the first is 0)" in place


def test_tables_and_texts(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfgoal,target\r\n"one, two","x\r\ny"\r\n\r\nthree,\r\n')
    (tmp_path / "a.tsv").write_text("goal\ttarget\none, two\tx\n")
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  two\u2028three \n".encode())
    table = [(2, {"goal": "one, two", "target": "x\r\ny"}), (5, {"goal": "three", "target": ""})]
    assert list(read_rows(str(tmp_path / "a.csv"))) == table
    assert list(read_rows(str(tmp_path / "a.tsv"))) == [(2, {"goal": "one, two", "target": "x"})]
    texts = read_rows(str(tmp_path / "a.txt"))
    assert list(texts) == [(1, {"prompt": "one"}), (3, {"prompt": "two\u2028three"})]
    assert texts.place(3).endswith("a.txt:3")


def test_the_fingerprint_is_of_the_content(tmp_path):
    file = tmp_path / "a.jsonl"
    seen = set()
    for text in ('{"a": 1}', '{"a": 2}', '{"a": 1}'):
        file.write_text(text)
        seen.add(read_rows(str(file)).fingerprint)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.jsonl", b'{"a": 1}\n\n{"a": }\n', r"x\.jsonl:3: not valid JSON: Expecting value at column 7"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', r"x\.jsonl:2: expected an object with columns, got list"),
        ("x.jsonl", b'{"a": "\xff"}\n', r"x\.jsonl:1: not UTF-8: invalid start byte"),
        ("x.json", b'[{"a": 1},\n {"a": 1]', r"x\.json:2: not valid JSON"),
        ("x.json", b'{"a": 1}\n{"a": 2}', r"x\.json:2: not valid JSON: Extra data .*named \.jsonl"),
        ("x.json", b'{"a": 1}', "expected a list of objects, got dict"),
        ("x.json", b'[{"a": 1}, 2]', r"x\.json, row 1 \(the first is 0\): expected an object"),
        ("x.parquet", b"no parquet", r"x\.parquet: not a Parquet file"),
        ("x.xlsx", b"a,b", r"expected a file named \.jsonl.*got \.xlsx"),
        ("x.csv", b"a,b\n1,2\n\n3\n", r"x\.csv:4: expected 2 columns as in the first line, got 1"),
        ("x.csv", b'a,b\n1,"2"3\n', r"x\.csv:2: not valid CSV"),
        ("x.csv", b"a,b,a\n", r"x\.csv:1: expected a name for each column, got 'a' twice"),
        ("x.txt", b"a\n\xff", r"x\.txt: not UTF-8"),
    ],
)
def test_broken_files(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=error):
        list(read_rows(str(tmp_path / name)))


def test_splits_and_paths_that_do_not_exist(folder):
    with pytest.raises(ValueError, match="expected a split, one of train, test; none was chosen"):
        read_rows(str(folder / "both"))
    with pytest.raises(ValueError, match="expected a split of train, test, got 'dev'"):
        read_rows(str(folder / "both"), "dev")
    with pytest.raises(ValueError, match="expected no split for a folder that holds one dataset"):
        read_rows(str(folder / "saved"), "train")
    with pytest.raises(ValueError, match="expected no split for a file"):
        read_rows(str(folder / "a.jsonl"), "train")
    for path in ("pairs.jsonl", "data/pairs.parquet", "/no/where", "../pairs", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_rows(path)


def test_a_dataset_of_the_hub(folder, monkeypatch):
    asked = {}

    def load_dataset(path, name, split, revision):
        asked.update(path=path, name=name, split=split, revision=revision)
        found = datasets.load_from_disk(str(folder / "both"))
        return found if split is None else found[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("some/pairs", "test", subset="en", revision="main")
    assert asked == {"path": "some/pairs", "name": "en", "split": "test", "revision": "main"}
    assert [row for _, row in rows] == ROWS[:1] and rows.source == "some/pairs, en, test"
    with pytest.raises(ValueError, match="some/pairs: expected a split, one of train, test"):
        read_rows("some/pairs")


def test_what_the_hub_answers_is_told_in_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"some/pairs: not a file or folder.*: ConnectionError: no route$"):
        read_rows("some/pairs")


def test_libraries_that_are_missing_are_named(folder, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert len(list(read_rows(str(folder / "a.jsonl")))) == 5
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        list(read_rows(str(folder / "a.parquet")))
    for path in (str(folder / "saved"), "some/pairs"):
        with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
            read_rows(path)

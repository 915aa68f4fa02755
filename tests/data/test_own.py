"""A run's own sets: what is read, what is dropped and counted, how it is divided, what is said of what does not fit."""

import json
import random
import string

import datasets
import pytest

import tiny
from evaluation.test_metrics import assert_matches
from fastguard.data import corpus, sets
from fastguard.data.options import BenignParts, Columns, PairParts, RetainParts, SetConfig, UserData
from fastguard.data.sources import DataSource, describe
from fastguard.run.config import DataConfig

TOKENIZER = tiny.tokenizer()


def words(kind, count):
    """Prompts of two words that no other prompt has."""
    rng = random.Random(kind)
    made = ["".join(rng.choices(string.ascii_lowercase, k=7)) for _ in range(2 * count)]
    return [f"{a} {b}" for a, b in zip(made[::2], made[1::2], strict=True)]


def pairs(count=40, kind="pairs"):
    return [{"prompt": p, "harmful": f"sure {p[:3]}", "harmless": f"no {p[:3]}"} for p in words(kind, count)]


def answers(count=40, kind="retain"):
    return [{"prompt": p, "answer": f"well {p[:3]}"} for p in words(kind, count)]


@pytest.fixture
def wrote(tmp_path):
    """Writes rows to a file, and gives the set's configuration."""

    def write(name, rows, **more):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return SetConfig(path=str(file), **more)

    return write


def build(seed=0, **own):
    return corpus.build_corpus(TOKENIZER, DataConfig(seed=seed, own=UserData(**own)))


def prompt_of(encoded):
    return TOKENIZER.decode(encoded.ids[: encoded.prompt])


def answer_of(encoded):
    return TOKENIZER.decode(encoded.ids[encoded.prompt :])


def turn(prompt):
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_every_row_is_in_one_part_with_its_own_answers(wrote):
    rows, retain, benign = pairs(), answers(), answers(10, "benign")
    made = build(
        pairs=wrote("pairs", rows), retain=wrote("retain", retain), edgy=wrote("edgy", answers(5, "edgy")),
        benign=wrote("benign", benign),
    )  # fmt: skip
    known = {turn(r["prompt"]): r for r in rows}
    parts = {"align": made.safe["align"], **made.harmful}
    assert {name: len(items) for name, items in parts.items()} == {
        "align": 8, "immunize": 16, "attack": 10, "measure": 6
    }  # fmt: skip
    prompts = [prompt_of(e) for items in parts.values() for e in items]
    assert sorted(prompts) == sorted(known)
    for items in made.harmful.values():
        assert all(answer_of(e) == known[prompt_of(e)]["harmful"] + "<|im_end|>" for e in items)
    for items in made.safe.values():
        assert all(answer_of(e) == known[prompt_of(e)]["harmless"] + "<|im_end|>" for e in items)
    assert [prompt_of(e) for e in made.safe["immunize"]] == [prompt_of(e) for e in made.harmful["immunize"]]
    assert [turn(p) for p in made.requests] == [prompt_of(e) for e in made.harmful["measure"]]
    assert (len(made.harmless["align"]), len(made.harmless["immunize"]), len(made.instructions)) == (16, 20, 4)
    assert [turn(p) for p in made.instructions] == [prompt_of(e) for e in made.perplexity(9)]
    assert max(len(e.ids) - e.prompt for e in made.perplexity(3)) == 3
    assert len(made.edgy) == 5 and (len(made.benign_train), len(made.benign_measure)) == (8, 2)
    assert made.pad == TOKENIZER.pad_token_id and made.notes == []
    assert set(made.sources) == {"harmful", "harmless", "edgy", "benign"}
    for source in made.sources.values():
        assert_matches(DataSource, json.loads(json.dumps(source)))
        assert source["fingerprint"].startswith("sha256:") and source["dropped"] == {} and source["cut"] == 0
    again = build(pairs=wrote("pairs", rows), retain=wrote("retain", retain))
    other = build(1, pairs=wrote("pairs", rows), retain=wrote("retain", retain))
    assert again.harmful == made.harmful != other.harmful


def test_chat_messages_system_prompts_and_columns_of_other_names(wrote):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    rows = [
        {"question": [*turns, {"role": "user", "content": p}], "bad": [{"role": "assistant", "content": "sure"}],
         "good": {"role": "assistant", "content": "no"}, "sys": None if i else "be odd"}
        for i, p in enumerate(words("chat", 12))
    ]  # fmt: skip
    retain = [{"chat": [{"role": "system", "content": "own"}, {"role": "user", "content": p},
                        {"role": "assistant", "content": "well"}]} for p in words("x", 6)]  # fmt: skip
    columns = Columns(prompt="question", harmful="bad", harmless="good", system="sys")
    made = build(
        pairs=wrote("pairs", rows, columns=columns, system="be kind"),
        retain=wrote("retain", retain, columns=Columns(messages="chat"), system="be kind"),
        edgy=wrote("edgy", [{"messages": [*turns[:1]]}, {"messages": [{"role": "user", "content": "ho"}, turns[1]]}]),
    )
    every = [e for items in (made.safe["align"], *made.harmful.values()) for e in items]
    systems = [prompt_of(e).split("\n")[1].removesuffix("<|im_end|>") for e in every]
    assert sorted(systems) == ["be kind"] * 11 + ["be odd"]
    for e in every:
        assert "user\nhi<|im_end|>\n<|im_start|>assistant\nyes?<|im_end|>\n<|im_start|>user\n" in prompt_of(e)
    assert {answer_of(e) for e in made.harmful["attack"]} == {"sure<|im_end|>"}
    kept = [e for items in made.harmless.values() for e in items]
    assert all(prompt_of(e).startswith("<|im_start|>system\nown<|im_end|>") for e in kept)
    assert made.requests[0][0]["role"] == "system" and made.requests[0][-1]["role"] == "user"
    assert made.edgy == [[turns[0]], [{"role": "user", "content": "ho"}]]


def test_what_is_dropped_and_cut_is_counted(wrote):
    rows = pairs()
    rows += [rows[0], {**rows[1], "prompt": f" {rows[1]['prompt']}  "}]  # duplicates
    rows += [{**rows[2], "prompt": " "}, {**rows[3], "harmful": ""}]  # empty
    rows += [{**rows[4], "prompt": "long " * 40}]
    rows += [{**rows[5], "harmful": "another answer"}]  # no duplicate
    rows[6]["harmless"] = "cut " * 30
    made = build(pairs=wrote("p", rows), retain=wrote("r", answers()), prompt_tokens=150, answer_tokens=30)
    source = made.sources["harmful"]
    assert source["rows"] == 46 and source["dropped"] == {"duplicate": 2, "empty": 2, "prompt too long": 1}
    assert sum(s["prompts"] for s in source["splits"].values()) == 41
    assert source["cut"] == sum(len(e.ids) - e.prompt == 30 for e in (*made.safe["align"], *made.safe["immunize"])) == 1
    both = [e for items in (made.safe["align"], *made.harmful.values()) for e in items
            if prompt_of(e) == turn(rows[5]["prompt"])]  # fmt: skip
    assert len(both) == 2
    assert describe(made.sources)[0].endswith(
        f"46 rows; left out: duplicate 2, empty 2, prompt too long 1, answers cut {source['cut']}"
        "; align 9, immunize 16, attack 10, measure 6"
    )


PAIR = {"harmful": "x", "harmless": "y"}
BAD = [
    ({"prompt": "hi", "harmless": "no"}, "expected a column 'harmful', got 'prompt', 'harmless'; `placeholders: true`"),
    ({"prompt": "hi", "harmful": "x"}, "expected a column 'harmless', .*`refusals: true` does without"),
    ({**PAIR, "prompt": 5}, "column 'prompt': expected a string or a list of messages, got int"),
    ({**PAIR, "prompt": "hi", "harmful": None}, "column 'harmful': expected a string .*, got null"),
    ({**PAIR, "prompt": [{"role": "bot", "content": "x"}]}, "column 'prompt': message 0: expected a role"),
    ({**PAIR, "prompt": [{"role": "assistant", "content": "x"}]}, "column 'prompt': .*end with the user's turn"),
]


@pytest.mark.parametrize(("row", "error"), BAD)
def test_a_row_that_does_not_fit_is_named_or_dropped(wrote, row, error):
    rows = pairs()
    rows.insert(7, row)
    given = {"pairs": wrote("pairs", rows), "retain": wrote("retain", answers())}
    with pytest.raises(ValueError, match=rf"pairs: .*pairs\.jsonl:8: {error}"):
        build(**given)
    made = build(**given, on_bad_row="drop")
    assert sum(made.sources["harmful"]["dropped"].values()) == 1 and made.sources["harmful"]["rows"] == 41


def test_errors_quote_no_text_of_a_pair(wrote):
    rows = [{"prompt": [{"role": "user", "content": "SECRET"}, {"role": "SECRET2", "content": 1}], "harmful": "SECRET"}]
    with pytest.raises(ValueError, match="message 1: expected a role") as raised:
        build(pairs=wrote("pairs", rows, refusals=True), retain=wrote("retain", answers()))
    assert "'SECRET'" not in str(raised.value)


def test_broken_json_is_an_error_even_where_bad_rows_are_dropped(tmp_path, wrote):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs(1)[0]) + "\n{oh\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: not valid JSON"):
        build(pairs=SetConfig(str(tmp_path / "pairs.jsonl")), retain=wrote("r", answers()), on_bad_row="drop")


def test_a_template_that_refuses_a_row_names_it(wrote):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    own = UserData(pairs=wrote("p", pairs(), system="be kind"), retain=wrote("r", answers()))
    with pytest.raises(ValueError, match=r"pairs: .*p\.jsonl:1: the chat template refuses .*no system"):
        corpus.build_corpus(tokenizer, DataConfig(own=own))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^tokenizer: .* has no chat template"):
        corpus.build_corpus(tokenizer, DataConfig(own=own))


def test_placeholders_and_refusals_take_the_place_of_answers(wrote):
    rows = [{"prompt": p, "harmful": "NEVER READ"} for p in words("pairs", 40)]
    made = build(pairs=wrote("p", rows, placeholders=True, refusals=True), retain=wrote("r", answers()))
    for i, e in enumerate(made.harmful["immunize"]):
        request = prompt_of(e).split("\n")[1].removesuffix("<|im_end|>")
        assert answer_of(e) == sets.placeholder(request, i) + "<|im_end|>"
        assert answer_of(made.safe["immunize"][i]) == sets.refusal(i) + "<|im_end|>"


def test_held_out_sets_of_their_own(wrote):
    rows, held, retain = pairs(), pairs(6, "held"), answers()
    rows += held[:2]  # trained on, were it not for the held-out set
    rows += [{**held[3], "prompt": f"now {held[3]['prompt']}"}]  # the same words: a near-duplicate
    made = build(
        pairs=wrote("pairs", rows), retain=wrote("retain", retain), measure_harmful=wrote("held", held),
        measure_harmless=wrote("kept", answers(5, "kept")),
    )  # fmt: skip
    assert made.requests == [r["prompt"] for r in held]
    assert made.sources["harmful"]["dropped"] == {"also in measure_harmful": 2}
    assert made.sources["harmful"]["splits"]["measure"] == {"prompts": 6, "clusters": 6}
    assert made.sources["measure_harmful"]["splits"] == {"measure": {"prompts": 6, "clusters": 6}}
    assert made.sources["measure_harmless"]["rows"] == 5 and len(made.perplexity(4)) == 5
    assert sum(len(e) for e in (made.safe["align"], made.harmful["immunize"], made.harmful["attack"])) == 41
    assert "1 of the 41 prompts of pairs that are trained on resemble a held-out one" in made.notes[0]


def test_parts_as_the_owner_says(wrote):
    names = ["immunize"] * 5 + ["attack"] * 4 + ["measure"] * 3
    rows = [{**r, "use": name} for r, name in zip(pairs(12), names, strict=True)]
    given = {"columns": Columns(part="use")}
    retain = wrote("r", answers())
    made = build(pairs=wrote("p", rows, **given), retain=retain)
    assert made.requests == [r["prompt"] for r in rows[9:]]
    assert [prompt_of(e) for e in made.harmful["immunize"]] == [turn(r["prompt"]) for r in rows[:5]]
    assert made.safe["align"] == [] and "No pairs to align with: the model is immunized as it is." in made.notes

    with pytest.raises(ValueError, match=r"p\.jsonl:13: column 'use': expected one of align, .*, got 'train'"):
        build(pairs=wrote("p", [*rows, {**rows[0], "use": "train"}], **given), retain=retain)
    with pytest.raises(ValueError, match=r"p\.jsonl:13: column 'use': expected 'immunize' as in .*:1, which has the"):
        build(pairs=wrote("p", [*rows, {**rows[0], "use": "attack"}], **given), retain=retain)
    with pytest.raises(ValueError, match="expected rows in the part immunize, got none"):
        build(pairs=wrote("p", rows[5:], **given), retain=retain)
    with pytest.raises(ValueError, match="3 rows are in the part measure, and measure_harmful is given as well"):
        build(pairs=wrote("p", rows, **given), retain=retain, measure_harmful=wrote("h", pairs(3, "h")))


def test_a_similarity_cluster_is_in_one_part(wrote):
    topics = words("topics", 30)
    rows = [{"prompt": w.format(t), "harmful": "x", "harmless": "y"} for t in topics for w in ("{}", "now {}", "{} ok")]
    made = build(pairs=wrote("p", rows), retain=wrote("r", answers()))
    parts = [made.safe["align"], *made.harmful.values()]
    found = [{t for t in topics for e in part if t in prompt_of(e)} for part in parts]
    assert sum(len(f) for f in found) == 30 and all(found)
    splits = made.sources["harmful"]["splits"]
    assert {n: s["prompts"] for n, s in splits.items()} == {n: 3 * s["clusters"] for n, s in splits.items()}


def test_sizes_as_counts_and_shares(wrote):
    retain = wrote("r", answers())
    made = build(pairs=wrote("p", pairs()), retain=retain, pair_parts=PairParts(align=0, attack=5, measure=10))
    assert {n: s["prompts"] for n, s in made.sources["harmful"]["splits"].items()} == {
        "align": 0, "immunize": 25, "attack": 5, "measure": 10
    }  # fmt: skip
    made = build(pairs=wrote("p", pairs()), retain=retain, pair_parts=PairParts(4, 5, 6, 7), split_off=2)
    assert made.sources["harmful"]["dropped"] == {"left over": 18}
    assert len(made.requests) == 7  # a count is kept; a share is cut
    assert len(build(pairs=wrote("p", pairs()), retain=retain, split_off=2).requests) == 2
    assert build(pairs=wrote("p", pairs(), limit=9), retain=retain).sources["harmful"]["rows"] == 9


def test_too_few_prompts_are_named_with_what_was_dropped(wrote):
    retain = wrote("r", answers())
    with pytest.raises(ValueError, match=r"pairs: no row is left: 40 rows of .*p\.jsonl, dropped: prompt too long 40; "
                                         r"prompts may have 9 tokens \(prompt_tokens\)"):  # fmt: skip
        build(pairs=wrote("p", pairs()), retain=retain, prompt_tokens=9)
    with pytest.raises(ValueError, match=r"pairs: 3 prompts are too few for the parts align 0.2, immunize 0.4"):
        build(pairs=wrote("p", pairs(3)), retain=retain)
    with pytest.raises(ValueError, match=r"pairs: 40 prompts are too few for the parts align 50, immunize 0.4"):
        build(pairs=wrote("p", pairs()), retain=retain, pair_parts=PairParts(align=50))
    with pytest.raises(ValueError, match="retain: no row is left: 0 rows"):
        build(pairs=wrote("p", pairs()), retain=wrote("empty", []))
    alike = [{**r, "prompt": f"one and the same request {i}"} for i, r in enumerate(pairs())]
    with pytest.raises(ValueError, match=r"pairs: part \w+ should have \d+ prompts and gets 0: 40 prompts in 1 simil"):
        build(pairs=wrote("p", alike), retain=retain)


def test_absent_sets_are_said(wrote):
    made = build(
        pairs=wrote("p", pairs()), retain=wrote("r", answers()), pair_parts=PairParts(attack=0, measure=0),
        retain_parts=RetainParts(measure=0),
    )  # fmt: skip
    assert made.requests == made.instructions == made.edgy == made.benign_train == made.harmful["attack"] == []
    assert made.perplexity(4) == []
    assert len(made.notes) == 5 and all("No " in note for note in made.notes)


def test_packaged_sets_beside_own_ones(wrote, monkeypatch):
    for name in ("advbench", "edgy", "commonsense"):
        rows = tuple(sets.Example(p, "it" if name == "commonsense" else "") for p in words(name, 20))
        data = sets.DataSet(rows, f"made up: {name}", "free")
        monkeypatch.setattr(sets, name, lambda data=data: data)
    made = build(
        pairs=SetConfig("packaged", placeholders=True, refusals=True), retain=wrote("r", answers()),
        edgy=SetConfig("packaged", limit=7), benign=SetConfig("packaged"), benign_parts=BenignParts(5, 3),
    )  # fmt: skip
    assert made.sources["harmful"]["source"] == "made up: advbench" and made.sources["harmful"]["licence"] == "free"
    assert made.sources["harmful"]["fingerprint"] is None
    assert len(made.edgy) == 7 and (len(made.benign_train), len(made.benign_measure)) == (5, 3)


def test_parquet_and_saved_datasets_give_what_json_gives(wrote, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], **{k: r[k] for k in ("harmful", "harmless")}}
            for r in pairs()]  # fmt: skip
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "p.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    retain = wrote("r", answers())
    found = [build(pairs=SetConfig(str(tmp_path / name)), retain=retain) for name in ("p.parquet", "saved")]
    found.append(build(pairs=wrote("p", rows), retain=retain))
    assert found[0].harmful == found[1].harmful == found[2].harmful

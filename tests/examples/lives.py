"""Runs of examples/fsdp2.py on two processes, killed in a step and in every stage of a save.

``lives.py FOLDER DEFENSE save|background``

Each life forks two ranks off this process (which has imported everything and started nothing), and ends by SIGKILL or
by itself. When all are through, the last checkpoint is compared with that of a run that nobody killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import common
import fsdp2

from fastguard.trainers import checkpoint
from fastguard.trainers.background import BackgroundSaver

STEPS, ACCUMULATE = 5, 1


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def countdown(calls: int) -> Callable[..., None]:
    """A hook that kills at its last call."""
    left = [calls]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            die()

    return hook


def in_a_step(rank: int, folder: Path) -> None:
    """Rank 1, in the last micro-batch of step 2, while a forward runs, at tampered weights if the defense has any."""
    made = fsdp2.make_defense

    def make_defense(name: str, model: Any, pairs: Any, given: Any = ()) -> tuple[Any, Any]:
        defense, passes = made(name, model, pairs, given)

        def until(wrapped: Any, scale: float) -> Any:
            if defense.step == 2 * ACCUMULATE - 1 and rank == 1:
                forwards = 1 if name == "repnoise" else 2
                wrapped.model.layers[1].register_forward_hook(countdown(forwards))
            return passes(wrapped, scale)

        return defense, until

    fsdp2.make_defense = make_defense


def while_writing(rank: int, folder: Path) -> None:
    """Both ranks' files are there, the list of what they hold is not."""
    if rank == 0:
        dcp.FileSystemWriter.finish = die


def half_a_file(rank: int, folder: Path) -> None:
    """Rank 1's file is cut off."""
    write = dcp.FileSystemWriter.write_data

    def write_data(self: Any, plan: Any, planner: Any) -> Any:
        write(self, plan, planner).wait()
        for file in Path(self.path).glob("__1_*"):
            os.truncate(file, file.stat().st_size // 2)
        die()

    if rank == 1:
        dcp.FileSystemWriter.write_data = write_data


def before_the_rename(rank: int, folder: Path) -> None:
    """All is written, under its temporary name."""
    rename = os.rename

    def killed(a: Any, b: Any) -> None:
        if str(a).endswith(".partial"):
            die()
        rename(a, b)

    os.rename = killed


def before_the_pointer(rank: int, folder: Path) -> None:
    """Under its name, but nothing points to it; at the second save of this life."""
    replace, calls = os.replace, []

    def killed(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == 2:
            die()
        replace(a, b)

    os.replace = killed


def while_clearing_up(rank: int, folder: Path) -> None:
    """The new one is pointed to, an old one is half deleted."""
    rmtree = shutil.rmtree

    def killed(path: Any, *args: Any) -> None:
        if (folder / "latest").read_text() == "step-00000004":
            next(p for p in Path(path).iterdir()).unlink()
            die()
        rmtree(path, *args)

    shutil.rmtree = killed


def in_background(fate: Callable[[int, Path], None] | None) -> BackgroundSaver:
    """Let the example save in the background; a life that ends in a step has saved the one before it."""
    saver = BackgroundSaver()

    def save(*args: Any) -> Path:
        path = saver.save(*args)
        if fate is in_a_step:
            saver.wait()
        return path

    fsdp2.save = save
    return saver


LIVES: list[tuple[Callable[[int, Path], None], str]] = [
    (in_a_step, "step-00000001"),
    (half_a_file, "step-00000001"),
    (while_writing, "step-00000001"),
    (before_the_rename, "step-00000001"),
    (before_the_pointer, "step-00000002"),
    (while_clearing_up, "step-00000004"),
]
"""How a life ends, and the checkpoint it leaves to go on from."""


def live(
    folder: Path, defense: str, fate: Callable[[int, Path], None] | None, background: bool, save_every: int = 1
) -> bool:
    """Whether it ended by itself."""
    store = folder.with_suffix(".store")
    store.unlink(missing_ok=True)
    children = {}
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if fate:
                    fate(rank, folder)
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
                )
                given = ["--out", str(folder), "--defense", defense, "--steps", str(STEPS)]
                given += ["--accumulate", str(ACCUMULATE), "--save-every", str(save_every)]
                random.seed(os.getpid() if (folder / "latest").exists() else rank)  # a resumed run has the saved state
                saver = in_background(fate) if background else None
                fsdp2.train(fsdp2.arguments(given))
                if saver is not None:
                    saver.wait()
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children[pid] = rank
    ends = {}
    while children:
        pid, status = os.wait()
        ends[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if -signal.SIGKILL in ends.values():  # as torchrun does
            for other in children:
                os.kill(other, signal.SIGKILL)
    killed = -signal.SIGKILL in ends.values()  # and then the other may have seen its peer go
    assert killed or set(ends.values()) == {0}, ends
    return not killed


def contents(folder: Path) -> dict[str, Any]:
    """Every tensor and every rank's own part of the latest checkpoint."""
    path = folder / (folder / "latest").read_text()
    found: dict[str, Any] = {}
    for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
        found[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else b""
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return {name: checkpoint.unpacked(v) if isinstance(v, bytes) else v for name, v in found.items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main() -> None:
    root, defense, background = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "background"
    root.mkdir(parents=True, exist_ok=True)
    common.make_defense(defense, common.make_model(None), common.Pairs(None, None, 2, 0, 2))  # what it imports
    whole, broken = root / "whole", root / "broken"
    assert live(whole, defense, None, False, save_every=STEPS)
    for fate, left in LIVES:
        assert not live(broken, defense, fate, background), f"{fate.__name__}: nobody was killed"
        found = (broken / "latest").read_text()
        assert found == left, f"{fate.__name__}: expected {left}, found {found}"
        print(f"killed: {fate.__name__}", flush=True)
    assert live(broken, defense, None, background)
    assert not list(broken.glob("*.partial"))
    a, b = contents(whole), contents(broken)
    assert a.keys() == b.keys()
    assert sum(isinstance(v, torch.Tensor) for v in a.values()) == 3 * 21  # weights and both moments
    for name, value in a.items():
        assert same(value, b[name]), f"{name} differs from the run that nobody killed"
    drawn = [a[f"rank {rank}"]["torch"] for rank in range(2)]
    assert not torch.equal(*drawn)  # dropout: each rank its own
    counted = a["rank 0"]["counted"]["defense"]
    assert int(counted.get("step", counted.get("call"))) == STEPS * ACCUMULATE
    print("bit-equal", flush=True)


if __name__ == "__main__":
    main()

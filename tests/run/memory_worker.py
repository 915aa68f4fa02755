"""One of two processes that load a model and write it: RANK STORE MODEL OUT. Prints how far its memory rose, in bytes.

Counted is memory of its own; pages of files, which the system takes back when it needs them, are not.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastguard import parallel
from fastguard.run.config import ParallelConfig


def own() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@contextlib.contextmanager
def rise(found: list[int]) -> Iterator[None]:
    over = threading.Event()
    start = own()
    seen = [start]

    def watch() -> None:
        while not over.is_set():
            seen.append(own())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found.append(max(seen) - start)


def main() -> None:
    rank, store, source, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    parallel.FILE = 20 * 2**20  # as small beside this model as it is beside a large one
    for kind in ("tiny", "large"):  # what loading and writing anything takes comes first
        found: list[int] = []
        with rise(found):
            model = parallel.load_model(str(Path(source) / kind), torch.float32, ParallelConfig())
        with rise(found):
            parallel.save_model(model, None, out / kind)
    print(f"loading {found[0]} writing {found[1]}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

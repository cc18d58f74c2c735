# SPDX-License-Identifier: Apache-2.0
"""Two jobs that save the same tags into one folder at the same time, and a third that loads.

.venv/bin/python -m tests.checkpoint.two_writers [--saves 100] [--seed 0]

Each delays at random between writing its files and hashing them, where the other used to put its
own in their place. Under the folder's lock ``latest`` must always name a whole checkpoint; without
it a load gives what one of the two has saved, or is refused because a save replaced what it read.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest.mock import patch

import torch

from flora_dist import checkpoint
from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.lock import locked
from tests.checkpoint.small import Run, State, start

SAVED, TOLD, FAILED = "saved", "told of the other", "SAVE FAILED"
LOADED, REPLACED = "loaded, as one of them saved", "refused: replaced meanwhile"
WRONG, DAMAGED, LEFT = "WRONG STATE LOADED", "DAMAGED LATEST", "LEFTOVERS"
BAD = (FAILED, WRONG, DAMAGED, LEFT)


def save_many(
    folder: Path, who: int, saves: int, seed: int, together: Barrier, reports: Connection
) -> None:
    """Train and save, step after step; report what came of it."""
    torch.set_num_threads(1)
    drawn, hash_files = random.Random(seed + who), folders.hash_files

    def late(partial: Path, names: Iterable[str]) -> dict[str, folders.FileFacts]:
        time.sleep(drawn.uniform(0.0, 0.02))
        return hash_files(partial, names)

    run, found = start(data=who), Counter[str]()
    together.wait()
    with patch.object(folders, "hash_files", late):
        for step in range(1, saves + 1):
            run.train([step])
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                try:
                    save(folder, run, who, step)
                    found[SAVED] += 1
                except ValueError as error:
                    found[f"{FAILED}: {error}"] += 1
            found[TOLD] += any("another process is writing" in str(w.message) for w in told)
    reports.send(found)


def save(folder: Path, run: Run, who: int, step: int) -> None:
    checkpoint.save(folder, run.model, run.optimizer, step=step, extra={"who": who}, keep=3)


@contextmanager
def one_thread() -> Iterator[None]:
    """The writers' number of threads: a matrix product's last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@one_thread()
def digests_of(saves: int) -> dict[tuple[int, int], str]:
    """Whole states by writer and step."""
    found = {}
    for who in (0, 1):
        run = start(data=who)
        for step in range(1, saves + 1):
            run.train([step])
            found[who, step] = digest_of(run.state())
    return found


def digest_of(state: State) -> str:
    return hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()


def look(folder: Path, run: Run, known: dict[tuple[int, int], str]) -> str:
    """Whether ``latest`` is whole, then what a load makes of it."""
    with locked(folder):
        try:
            path = folders.resolve(folder)
            error = folders.verify_files(path, folders.read_manifest(path), share=(0, 1))
        except ValueError as damaged:
            error = str(damaged)
    if error is not None:
        return f"{DAMAGED}: {error}"
    try:
        loaded = checkpoint.load(folder, run.model, run.optimizer)
    except ValueError as refused:
        # The others: gone before its manifest was opened, or read.
        gone = ("was replaced or removed meanwhile", "json' is missing", "json' cannot be read")
        is_known = any(text in str(refused) for text in gone)
        return REPLACED if is_known else f"{DAMAGED}: {refused}"
    wanted = known.get((loaded.extra["who"], loaded.step))
    return LOADED if digest_of(run.state()) == wanted else f"{WRONG}: {loaded}"


def compete(saves: int, seed: int) -> Counter[str]:
    """What two writers and a reader have met, by kind."""
    known, reader = digests_of(saves), start(data=2)
    found: Counter[str] = Counter()
    context = multiprocessing.get_context("forkserver")
    # torch is imported once, in the server; each writer is a fork of it.
    context.set_forkserver_preload(["tests.checkpoint.small", "flora_dist.checkpoint"])
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "all"
        first = start(data=0)
        with one_thread():
            first.train([1])
        save(folder, first, 0, 1)
        pipes, together = [], context.Barrier(2)
        for who in (0, 1):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (folder, who, saves, seed, together, theirs)
            context.Process(target=save_many, args=arguments, daemon=True).start()
            theirs.close()
            pipes.append(ours)
        waiting = list(pipes)
        while waiting:
            for pipe in wait(waiting, timeout=0.0):
                found += pipe.recv()  # type: ignore[union-attr]
                waiting.remove(pipe)  # type: ignore[arg-type]
            found[look(folder, reader, known)] += 1
        save(folder, reader, 0, saves)
        if names := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
            found[f"{LEFT}: {names}"] += 1
    return found


def bad(found: Counter[str]) -> list[str]:
    return [kind for kind in found if kind.startswith(BAD)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    begun = time.monotonic()
    found = compete(chosen.saves, chosen.seed)
    for kind, count in sorted(found.items()):
        print(f"{count:6d} {kind}")
    print(f"{2 * chosen.saves} saves in {time.monotonic() - begun:.0f} s; {len(bad(found))} bad")
    return 1 if bad(found) else 0


if __name__ == "__main__":
    # Writers find their body by the name of its module, which must not be __main__.
    from tests.checkpoint import two_writers

    sys.exit(two_writers.main())

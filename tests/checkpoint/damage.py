# SPDX-License-Identifier: Apache-2.0
"""Random faults on checkpoints, and what loading makes of each.

.venv/bin/python -m tests.checkpoint.damage [--faults 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flora_dist import checkpoint
from flora_dist.checkpoint.folder import tag_of
from tests.checkpoint.killed_saves import kill
from tests.checkpoint.small import Run, State, start
from tests.checkpoint.verdict import (
    BAD,
    GOOD,
    LOADED,
    LOST,
    NAMELESS,
    OTHER,
    REFUSED,
    TOUCHED,
    WARNED,
    WRONG,
    Verdict,
    table,
)

PREVIOUS, NEWEST = 5, 10


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was done, and the name of the file that an error has to give."""

    what: str
    name: str


@dataclass(kw_only=True)
class Bench:
    """Two runs' checkpoints, their states, and a third run that loads."""

    home: Path
    running: Run
    states: dict[int, State] = field(default_factory=dict)
    """Of our run, by step."""


def prepare(home: Path) -> Bench:
    """Save two checkpoints of our run, and two of another that differs by its data alone."""
    bench = Bench(home=home, running=start(data=3))
    bench.running.train(range(2))
    for number, name in enumerate(("ours", "theirs")):
        run = start(data=number)
        for step in range(1, NEWEST + 1):
            run.train([step])
            if step in (PREVIOUS, NEWEST):
                checkpoint.save(home / name, run.model, run.optimizer, step=step)
                if name == "ours":
                    bench.states[step] = run.state()
    return bench


def _flip(ours: Path, _: Path, drawn: random.Random) -> Fault:
    file = _a_file(ours, drawn)
    raw = bytearray(file.read_bytes())
    bit = drawn.randrange(8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)
    return Fault(what=f"bit {bit} of {file.name} flipped", name=file.name)


def _truncate(ours: Path, _: Path, drawn: random.Random) -> Fault:
    file = _a_file(ours, drawn)
    length = drawn.randrange(file.stat().st_size)
    file.write_bytes(file.read_bytes()[:length])
    return Fault(what=f"{file.name} cut to {length} bytes", name=file.name)


def _delete(ours: Path, _: Path, drawn: random.Random) -> Fault:
    file = _a_file(ours, drawn)
    file.unlink()
    return Fault(what=f"{file.name} deleted", name=file.name)


def _swap(ours: Path, theirs: Path, drawn: random.Random) -> Fault:
    """A file, or the whole checkpoint, for another run's, or for the one before."""
    mine = drawn.choice([ours / tag_of(NEWEST), _a_file(ours, drawn)])
    other = theirs / mine.relative_to(ours)
    if mine.parent.name == tag_of(NEWEST) and drawn.random() < 0.3:
        other = ours / tag_of(PREVIOUS) / mine.name
    kept = mine.with_name("kept")
    # The one before must stay what it is: theirs is moved, ours is copied.
    mine.rename(kept)
    if other.is_relative_to(theirs):
        other.rename(mine)
        kept.rename(other)
    else:
        shutil.copy(other, mine)
        kept.unlink()
    whose = "theirs" if other.is_relative_to(theirs) else "the one before"
    name = "latest" if mine.is_dir() else mine.name
    return Fault(what=f"{mine.name} swapped for {whose}", name=name)


def _a_file(ours: Path, drawn: random.Random) -> Path:
    """Of the newest checkpoint, or ``latest``."""
    return drawn.choice(sorted([*(ours / tag_of(NEWEST)).iterdir(), ours / "latest"]))


FAULTS: dict[str, Callable[[Path, Path, random.Random], Fault]] = {
    "truncate": _truncate,
    "flip": _flip,
    "delete": _delete,
    "swap": _swap,
}


def damage(bench: Bench, kind: str, seed: int) -> Verdict:
    """One fault on a copy of the checkpoints, and what loading makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(bench.home, copy)
        fault = FAULTS[kind](copy / "ours", copy / "theirs", random.Random(seed))
        found, detail = judge(bench, copy / "ours", fault)
        return Verdict(kind=kind, what=fault.what, found=found, detail=detail)


def judge(bench: Bench, ours: Path, fault: Fault) -> tuple[str, str]:
    """Load a damaged folder into the running run, then the previous checkpoint."""
    found, detail = _loaded(bench, ours, fault)
    if found in GOOD:
        try:
            checkpoint.load(ours / tag_of(PREVIOUS), bench.running.model, bench.running.optimizer)
        except Exception as error:
            return LOST, str(error)
        if bench.running.state() != bench.states[PREVIOUS]:
            return LOST, "its state is another"
    # Back to what no checkpoint holds, for the next fault.
    bench.running.train([NEWEST + 1])
    return found, detail


def _loaded(bench: Bench, ours: Path, fault: Fault) -> tuple[str, str]:
    before = bench.running.state()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            checkpoint.load(ours, bench.running.model, bench.running.optimizer)
    except ValueError as error:
        if bench.running.state() != before:
            return TOUCHED, str(error)
        return (REFUSED if fault.name in str(error) else NAMELESS), str(error)
    except Exception as error:
        return OTHER, repr(error)
    after = bench.running.state()
    if after == bench.states[NEWEST]:
        return LOADED, ""
    if after == bench.states[PREVIOUS] and told:
        return WARNED, str(told[0].message)
    return WRONG, ""


# ---- many


def strike(faults: int, seed: int, kinds: Sequence[str] = (*FAULTS, "kill -9")) -> list[Verdict]:
    """Faults of all kinds in turn, each of a seed of its own."""
    verdicts = []
    with tempfile.TemporaryDirectory() as home:
        bench = prepare(Path(home) / "runs")
        for number in range(faults):
            kind = kinds[number % len(kinds)]
            drawn = 1_000_000 * seed + number
            at_files = kind in FAULTS
            verdicts.append(damage(bench, kind, drawn) if at_files else kill(drawn))
    return verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.monotonic()
    verdicts = strike(chosen.faults, chosen.seed)
    print(table(verdicts))
    kills = Counter(verdict.what for verdict in verdicts if verdict.kind == "kill -9")
    print("kills:", ", ".join(f"{count} {what}" for what, count in sorted(kills.items())))
    print(f"{len(verdicts)} faults in {time.monotonic() - begun:.0f} s, torch {torch.__version__}")
    bad = [verdict for verdict in verdicts if verdict.found in BAD]
    for verdict in bad:
        print(verdict)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

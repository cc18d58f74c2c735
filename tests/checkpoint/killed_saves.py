# SPDX-License-Identifier: Apache-2.0
"""kill -9 of a process that trains and saves, at random moments."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from flora_dist import checkpoint
from flora_dist.checkpoint.folder import tag_of
from tests.checkpoint.small import Run, start
from tests.checkpoint.verdict import LOADED, LOST, WRONG, Verdict


def save_in_a_loop(folder: Path, tag: str | None, reports: Connection) -> None:
    """Train, save, report; without end."""
    torch.set_num_threads(1)
    run = start(data=0)
    for step in range(1, 10_000):
        run.train([step])
        checkpoint.save(folder, run.model, run.optimizer, step=step, tag=tag, keep=2)
        reports.send(step)


def kill(seed: int) -> Verdict:
    """Kill a process that saves, at a random moment; what is left must load, bit for bit.

    Half of them save under one tag again and again, half keep two.
    """
    drawn = random.Random(seed)
    tag = drawn.choice([None, "again"])
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "all"
        last = _saved_until_killed(folder, tag, drawn)
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        mode = "one tag" if tag else "two kept"
        try:
            found, detail = _after_kill(folder, tag, last)
        except Exception as error:
            found, detail = LOST, repr(error)
        what = f"{mode}, {'in a save' if left else 'between saves'}, {detail}"
        return Verdict(kind="kill -9", what=what, found=found, detail=f"{folder.name}: {left}")


def _saved_until_killed(folder: Path, tag: str | None, drawn: random.Random) -> int:
    """The last step that the process reported as saved."""
    context = multiprocessing.get_context("forkserver")
    # torch is imported once, in the server; each process that is killed is a fork of it.
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=save_in_a_loop, args=(folder, tag, theirs), daemon=True)
    process.start()
    theirs.close()
    last, taken = ours.recv(), 0.0
    for _ in range(drawn.randrange(1, 4)):
        begun = time.monotonic()
        last = ours.recv()
        taken = time.monotonic() - begun
    # A report is sent right after a save: within the next one, or just after it.
    time.sleep(drawn.uniform(0.0, 1.2 * taken))
    process.kill()
    process.join()
    try:
        while True:
            last = ours.recv()
    except EOFError:
        return last


def _after_kill(folder: Path, tag: str | None, last: int) -> tuple[str, str]:
    """Load the newest and the one before; both must be what the run was then. Then save again."""
    run = start(data=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = checkpoint.load(folder, run.model, run.optimizer)
    newest = loaded.step
    if newest not in (last, last + 1) or run.state() != _trained(newest).state():
        return WRONG, f"step {newest} after {last}"
    before = start(data=0)
    # By its own path: killed just before ``latest``, the tag has the new one, the folder the old.
    path = folder / (tag or tag_of(newest - 1))
    step = checkpoint.load(path, before.model, before.optimizer).step
    expected = (last, last + 1) if tag else (newest - 1,)
    if step not in expected or before.state() != _trained(step).state():
        return LOST, f"step {step}"
    run.train([newest + 1])
    checkpoint.save(folder, run.model, run.optimizer, step=newest + 1, tag=tag, keep=2)
    checkpoint.load(folder, before.model, before.optimizer)
    if before.state() != run.state():
        return WRONG, f"saved again at step {newest + 1}"
    return LOADED, "the old one loads" if newest == last else "the new one loads"


def _trained(steps: int) -> Run:
    run = start(data=0)
    run.train(range(1, steps + 1))
    return run

# SPDX-License-Identifier: Apache-2.0
"""Interpreters that end behind a message: no thread of gloo's may need them any more.

`python -m tests.trainer.exits 300` is the long form.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flora_dist.trainer.config import Config
from flora_dist.trainer.run import run
from tests.trainer.exits import PROGRAMS, held

FLORA = "optimizer={name: flora, lr: 1e-2}"


def ends(output: str) -> dict[str, str]:
    """How the runs of each program ended, from the lines that say so."""
    lines = [line.partition(" {") for line in output.splitlines() if line.endswith("}")]
    return {name: "{" + counted for name, _, counted in lines}


def test_a_message_outlives_the_thread_that_carried_it_and_the_fault_is_seen_where_none_does() -> (
    None
):
    # Once in some hundred runs a program that was done ended with "terminate called without an
    # active exception": gloo's thread freed the message of a program that was ending.
    messages = [name for name in PROGRAMS if not name.startswith("trainer")]
    done = held(len(messages) + 1, [*messages, "unkept"])
    assert ends(done.stdout) == dict.fromkeys(messages, "{0: 1}") | {"unkept": "{-6: 1}"}, (
        done.stdout
    )


def gloo_threads() -> int:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("pt_gloo") for name in names)


@pytest.mark.parametrize(
    "options",
    [
        ["backend.name=ddp", "gradients.level=compressed"],
        ["backend.name=fsdp1", "checkpoint={every: 1, asynchronous: true}"],
        ["backend.name=fsdp2", "gradients.level=fused", "checkpoint={every: 1}"],
        ["backend={name: hsdp, replicate: 1, shard: 1}"],
    ],
    ids=lambda options: options[0],
)
def test_no_thread_of_a_runs_groups_outlives_the_run(
    options: list[str], tiny: Callable[..., Config]
) -> None:
    before = gloo_threads()
    assert run(tiny(FLORA, "train.steps=1", *options)) == 0
    assert gloo_threads() == before

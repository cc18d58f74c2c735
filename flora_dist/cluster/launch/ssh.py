# SPDX-License-Identifier: Apache-2.0
"""How another host is reached: ssh that asks nothing and notices a host that is gone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

SILENCE_S = 5
"""Seconds without a word after which ssh asks the other end."""
QUESTIONS = 3
"""Unanswered questions after which it gives up: 15 to 20 s, where TCP alone takes a quarter of an
hour (measured: a launcher hung for ever behind a pulled cable)."""
OPTIONS = (
    "-oBatchMode=yes",  # a question nobody answers is a hang
    "-oConnectTimeout=10",
    f"-oServerAliveInterval={SILENCE_S}",
    f"-oServerAliveCountMax={QUESTIONS}",
)


def over_ssh(host: str, command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` on ``host``: ssh's one string is quoted word by word.

    >>> over_ssh("node2", ["echo", "a b"])[-2:]
    ['node2', "echo 'a b'"]
    """
    return ["ssh", *OPTIONS, host, shlex.join(command)]

# SPDX-License-Identifier: Apache-2.0
"""The trainer: a config file in, a trained model's numbers out. See README.md in this folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["add_arguments", "main", "start"]

_USER_ERROR = 2
_INTERRUPTED = 130
# torchrun looks ten times a second for a process that has ended, the deepspeed launcher once; then
# both end the others. The rest is for a busy machine, where process 0 may be seconds behind.
_LET_PROCESS_ZERO_SPEAK_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The trainer's command line, for `flora-dist train` and `python -m` alike."""
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key of the config; may be given several times",
    )


def main(arguments: Sequence[str]) -> int:
    """Parse a command line and run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flora_dist.trainer", description=__doc__)
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    return start(parsed.config, parsed.overrides)


def start(config: Path, overrides: Sequence[str]) -> int:
    """Run a config file: 0 when it finished, 130 after Ctrl-C, 2 for a mistake in the config."""
    try:
        from flora_dist.trainer.configfile import load_config
        from flora_dist.trainer.run import run

        return run(load_config(config, overrides))
    except ValueError as error:
        _report(str(error))
        return _USER_ERROR
    except KeyboardInterrupt:  # before the run could ask for a clean stop: nothing is written yet
        return _INTERRUPTED


def _report(message: str) -> None:
    """Say the error once: process 0 speaks, another one only if it outlives process 0's turn.

    All processes check the same config and make the same mistake; the launcher then ends them when
    process 0 has ended. A process still there after its wait has an error of its own.
    """
    process_rank = int(os.environ.get("RANK", "0"))
    if process_rank:
        time.sleep(_LET_PROCESS_ZERO_SPEAK_S)
        message = f"[process {process_rank}] {message}"
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()

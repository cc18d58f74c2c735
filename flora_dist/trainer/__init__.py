# SPDX-License-Identifier: Apache-2.0
"""The trainer: a config file in, a trained model's numbers out. See README.md in this folder."""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from pathlib import Path

from flora_dist.one_line_parser import OneLineParser
from flora_dist.world import join

__all__ = ["add_arguments", "main", "start"]

_USER_ERROR = 2
_INTERRUPTED = 130


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
    parser = OneLineParser(prog="python -m flora_dist.trainer", description=__doc__)
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    return start(parsed.config, parsed.overrides)


def start(config: Path, overrides: Sequence[str]) -> int:
    """Run a config file: 0 when it finished or after SIGTERM, 130 after Ctrl-C, 2 for a mistake.

    1 is any other failure. Whatever it is, one process says it, and no traceback comes twice.
    """
    try:
        join(os.environ)
        from flora_dist.trainer.configfile import load_config
        from flora_dist.trainer.run import run

        return run(load_config(config, overrides))
    except ValueError as error:
        # Imported where it is needed: without torch the mistake is another.
        from flora_dist.trainer.failure import tell_mistake

        tell_mistake(error)
        return _USER_ERROR
    except KeyboardInterrupt:  # before the run could ask for a clean stop: nothing is written yet
        return _INTERRUPTED
    except Exception as error:
        from flora_dist.trainer.failure import tell

        return tell(error)
    finally:
        # A failure holds the model in its traceback, and the model holds process groups, whose
        # threads must end before the interpreter does.
        gc.collect()

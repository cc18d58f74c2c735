# SPDX-License-Identifier: Apache-2.0
"""The front door to every launcher: the same arguments start a job through any of them.

Standard library only: its agents start on every host before anything else does.
"""

from __future__ import annotations

import argparse
import sys

__all__ = ["add_arguments", "start"]

_USER_ERROR = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `flora-dist launch`."""
    from flora_dist.cluster.launch.arguments import add

    add(parser)


def start(parsed: argparse.Namespace) -> int:
    """Run a job: its exit code, 128 + N after signal N, 1 where a host is lost, 2 for a mistake."""
    from flora_dist.cluster.launch.arguments import check_program, job_of, printed
    from flora_dist.cluster.launch.running import run

    try:
        job = job_of(parsed)
        if parsed.dry_run:
            sys.stdout.write(printed(job, parsed.launcher))
            return 0
        check_program(job)
        return run(job, parsed.launcher, grace_s=parsed.grace)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return _USER_ERROR

# SPDX-License-Identifier: Apache-2.0
"""`flora-dist doctor`: what is wrong with hosts on which a job is to run. See README.md here."""

from __future__ import annotations

import argparse
import signal
import sys

__all__ = ["add_arguments", "start"]

_FOUND, _USER_ERROR = 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `flora-dist doctor`."""
    from flora_dist.cluster.doctor import arguments as asked

    asked.add_arguments(parser)


def start(parsed: argparse.Namespace) -> int:
    """Examine the hosts and say what was found.

    Returns:
        0 where no error was found (there may be warnings), 1 with errors, 2 for a mistake in what
        was asked. Ctrl-C ends the process by its signal.
    """
    from flora_dist.cluster.doctor.arguments import checked
    from flora_dist.cluster.doctor.examination import examine
    from flora_dist.cluster.doctor.report import as_json, as_text, has_errors

    # Threads wait for hosts, and Python's own Ctrl-C would wait for them. What runs on a host ends
    # with its link, and that with this process.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        survey = examine(checked(parsed))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return _USER_ERROR
    finally:
        signal.signal(signal.SIGINT, previous)
    sys.stdout.write(f"{as_json(survey)}\n" if parsed.json else as_text(survey))
    return _FOUND if has_errors(survey) else 0

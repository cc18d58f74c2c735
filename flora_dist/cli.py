# SPDX-License-Identifier: Apache-2.0
"""The `flora-dist` command. Each subcommand imports what it needs when it runs, not before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flora_dist import trainer
from flora_dist.cluster import doctor, launch, planner

_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `flora-dist <subcommand> ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flora-dist", description="Sharded Flora: optimizer states as random projections."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model as a config file says")
    trainer.add_arguments(train)
    train.set_defaults(run=lambda parsed: trainer.start(parsed.config, parsed.overrides))
    convert = commands.add_parser(
        "convert",
        help="rewrite a checkpoint of DeepSpeed, torch's DCP or flora_dist",
        description="One process, no GPU. DST: a folder of checkpoints, or a name that ends in "
        ".pt for one file that a plain run loads. DeepSpeed's files are read without running code "
        "of theirs; its own loader runs what they hold: for trusted files alone.",
    )
    convert.add_argument("source", metavar="SRC", type=Path)
    convert.add_argument("target", metavar="DST", type=Path)
    convert.set_defaults(run=lambda parsed: _convert(parsed.source, parsed.target))
    start = commands.add_parser(
        "launch",
        help="start the trainer or any script on one or several hosts, through any launcher",
        description="Reaches every host, starts PROGRAM there through the launcher, and ends all "
        "of it when one part fails, a host no longer answers or a signal comes. Exit code: the "
        "job's, 128 + N after signal N, 1 where a host is lost, 2 for a mistake.",
    )
    launch.add_arguments(start)
    start.set_defaults(run=launch.start)
    examine = commands.add_parser(
        "doctor",
        help="look for what would break or slow a job on these hosts",
        description="Reaches every host, compares versions, files and settings, tries the links "
        "and a process group, and says a remedy for each finding. Exit code: 0 clean, 1 errors, "
        "2 a mistake in what was asked.",
    )
    doctor.add_arguments(examine)
    examine.set_defaults(run=doctor.start)
    plan = commands.add_parser(
        "plan",
        help="bytes and time of a training run, Flora beside other optimizers; needs no torch",
    )
    planner.add_arguments(plan)
    plan.set_defaults(run=planner.start)
    parsed = parser.parse_args(arguments)
    return int(parsed.run(parsed))


def _convert(source: Path, target: Path) -> int:
    """0 when it is written, 2 for a mistake in what was asked."""
    from flora_dist.checkpoint.convert.command import convert

    try:
        done = convert(source, target)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return _USER_ERROR
    sys.stdout.write(f"{done.form} checkpoint of step {done.step}: wrote {done.path}\n")
    if done.left_out:
        sys.stdout.write(f"left out, being no numbers or words: {', '.join(done.left_out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The `flora-dist` command. Each subcommand imports what it needs when it runs, not before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flora_dist import trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `flora-dist <subcommand> ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flora-dist", description="Sharded Flora: optimizer states as random projections."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model as a config file says")
    trainer.add_arguments(train)
    train.set_defaults(run=lambda parsed: trainer.start(parsed.config, parsed.overrides))
    parsed = parser.parse_args(arguments)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())

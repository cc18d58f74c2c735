# SPDX-License-Identifier: Apache-2.0
"""The `flora-dist` command. Each subcommand imports what it needs when it runs, not before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flora_dist import trainer
from flora_dist.cluster import doctor, launch, planner
from flora_dist.one_line_parser import OneLineParser
from flora_dist.version import __version__

_USER_ERROR = 2
_CONVERT = (
    "One process, no GPU. DST: a folder of checkpoints, or a name that ends in .pt for one file "
    "that a plain run loads. DeepSpeed's files are read without running code of theirs; its own "
    "loader runs what they hold: for trusted files alone."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `flora-dist <subcommand> ...`; the exit code, 2 for a mistake in what was asked."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        told_by = parser if words[0] in unknown else parsed.parser
        told_by.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(parsed.run(parsed))
    except ValueError as error:
        return _refuse(str(error))
    except OSError as error:  # a folder that cannot be made, a file that cannot be read
        if error.filename is None:
            raise
        return _refuse(f"{error.strerror}: {str(error.filename)!r}. Name another path.")


def _refuse(mistake: str) -> int:
    sys.stderr.write(f"error: {mistake}\n")
    return _USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="flora-dist", description="Sharded Flora: optimizer states as random projections."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model as a config file says")
    trainer.add_arguments(train)
    train.set_defaults(run=lambda parsed: trainer.start(parsed.config, parsed.overrides))
    _add_convert(
        commands.add_parser(
            "convert",
            help="rewrite a checkpoint of DeepSpeed, torch's DCP or flora_dist",
            description=_CONVERT,
        )
    )
    _add_tokenize(commands.add_parser("tokenize", help="write a corpus as a file of tokens"))
    _add_export(commands.add_parser("export", help="write a run's weights for transformers"))
    _add_generate(commands.add_parser("generate", help="let a trained model go on from a prompt"))
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
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    parser.set_defaults(run=lambda parsed: _convert(parsed.source, parsed.target))


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", metavar="CORPUS", help="as data.corpus of a config")
    parser.add_argument("target", metavar="OUT.npy", type=Path)
    parser.add_argument("--tokenizer", default="byte", help="as data.tokenizer (byte)")
    parser.add_argument("--field", default="text", help="as data.field (text)")
    parser.set_defaults(run=_tokenize)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", type=Path, help="<output.folder>/<output.name>"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="a folder that is made")
    parser.set_defaults(run=lambda parsed: _export(parsed.run_folder, parsed.target))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run, or an exported folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=100, help="at most so many (100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: no sampling (0.8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_generate)


def _tokenize(parsed: argparse.Namespace) -> int:
    from flora_dist.trainer.token_files import tokenize

    count = tokenize(parsed.corpus, parsed.target, tokenizer=parsed.tokenizer, field=parsed.field)
    sys.stdout.write(f"wrote {count:,} tokens to {parsed.target}\n")
    return 0


def _export(run: Path, target: Path) -> int:
    from flora_dist.trainer.export import export

    sys.stdout.write(f"wrote {export(run, target)}\n")
    return 0


def _generate(parsed: argparse.Namespace) -> int:
    from flora_dist.trainer.export import generate

    numbers = {name: getattr(parsed, name) for name in ("tokens", "temperature", "seed")}
    sys.stdout.write(f"{generate(parsed.folder, parsed.prompt, **numbers)}\n")
    return 0


def _convert(source: Path, target: Path) -> int:
    from flora_dist.checkpoint.convert.command import convert

    done = convert(source, target)
    sys.stdout.write(f"{done.form} checkpoint of step {done.step}: wrote {done.path}\n")
    if done.left_out:
        sys.stdout.write(f"left out, being no numbers or words: {', '.join(done.left_out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

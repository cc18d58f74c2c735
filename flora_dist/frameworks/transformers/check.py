# SPDX-License-Identifier: Apache-2.0
"""A Trainer trains with the Flora that it was asked for, and says first what its settings cost."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, trainer

from flora_dist.flora import Flora
from flora_dist.frameworks.inside import unwrapped
from flora_dist.frameworks.transformers.optimizer import (
    arguments_of,
    built_for,
    is_under_deepspeed,
)
from flora_dist.frameworks.transformers.word import WORD, check_words


class FloraCheck(TrainerCallback):
    """Compares what a Trainer steps with what it was given."""

    _given: Flora | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """Take in the model's arguments, and a Flora from ``optimizers=``.

        Raises:
            ValueError: ``optim_args`` that transformers cannot read.
        """
        del state, control
        check_words(args)
        if its.get("model") is not None:
            arguments_of[its["model"]] = args
            built_for.pop(its["model"], None)  # of a Trainer that had the model before
        found = its.get("optimizer")
        self._given = found if isinstance(found, Flora) else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """Nothing has been stepped yet; process 0 says what ``Flora.advice`` does, on stderr.

        Raises:
            ValueError: another optimizer is about to step.
        """
        del control
        is_asked = self._given is not None or its["model"] in built_for or args.optim == WORD
        found = unwrapped(its["optimizer"])
        if args.optim == WORD and args.optim_args and is_under_deepspeed():
            _check_followed(args.optim_args, its["model"])
        if is_asked and type(found) is not Flora:
            raise ValueError(
                f"the Trainer was asked for Flora and is about to train with "
                f"{type(found).__name__}: under DeepSpeed it drops optimizers=. Pass "
                "optimizer_cls_and_kwargs=flora_dist.transformers.flora(...)."
            )
        if isinstance(found, Flora) and state.is_world_process_zero and state.max_steps > 0:
            for sentence in found.advice(steps=state.max_steps):
                sys.stderr.write(f"Flora: warning: {sentence}\n")


def _check_followed(optim_args: str, model: Any) -> None:
    """Refuse words that nobody has read: a DeepSpeed config's block "optimizer" comes before them.

    Raises:
        ValueError: the model's Flora was built from that block.
    """
    if model not in built_for:
        raise ValueError(
            f"optim_args={optim_args!r} would be ignored: the DeepSpeed config has a block "
            '"optimizer", which decides. Move the settings there, or remove that block.'
        )


def watch_all() -> None:
    """Let every Trainer that is made from now on have the check; a second call does nothing."""
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if FloraCheck not in callbacks:
        callbacks.append(FloraCheck)

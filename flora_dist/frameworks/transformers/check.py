# SPDX-License-Identifier: Apache-2.0
"""A Trainer trains with the Flora that it was asked for, or says before the first step that not."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, trainer

from flora_dist.flora import Flora
from flora_dist.frameworks.inside import unwrapped
from flora_dist.frameworks.transformers.optimizer import arguments_of, built_for
from flora_dist.frameworks.transformers.word import WORD


class FloraCheck(TrainerCallback):
    """Compares what a Trainer steps with what it was given."""

    _given: Flora | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """Take in the model's arguments, and a Flora from ``optimizers=``."""
        del state, control
        if its.get("model") is not None:
            arguments_of[its["model"]] = args
            built_for.pop(its["model"], None)  # of a Trainer that had the model before
        found = its.get("optimizer")
        self._given = found if isinstance(found, Flora) else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **its: Any) -> None:
        """Nothing has been stepped yet.

        Raises:
            ValueError: another optimizer is about to step.
        """
        del state, control
        is_asked = self._given is not None or its["model"] in built_for or args.optim == WORD
        found = unwrapped(its["optimizer"])
        if is_asked and type(found) is not Flora:
            raise ValueError(
                f"the Trainer was asked for Flora and is about to train with "
                f"{type(found).__name__}: under DeepSpeed it drops optimizers=. Pass "
                "optimizer_cls_and_kwargs=flora_dist.transformers.flora(...)."
            )


def watch_all() -> None:
    """Let every Trainer that is made from now on have the check; a second call does nothing."""
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if FloraCheck not in callbacks:
        callbacks.append(FloraCheck)

# SPDX-License-Identifier: Apache-2.0
"""``TrainingArguments(optim="flora", optim_args="rank=4,...")``.

transformers knows optimizers by an enum and a private dict from it to functions; the only file
here that adds to them. Read in transformers 5.23.
"""

from __future__ import annotations

import ast
from typing import Any

import transformers
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from flora_dist.frameworks.transformers.optimizer import FloraFactory, check_names

WORD = "flora"
_WORDS = {"none": None, "true": True, "false": False}


def add_word() -> None:
    """Make the word known; a second call does nothing.

    Raises:
        RuntimeError: this version of transformers keeps its optimizers in another way.
    """
    enum: Any = OptimizerNames
    if WORD in enum._value2member_map_:
        return
    member = str.__new__(enum, WORD)
    member._name_, member._value_ = WORD.upper(), WORD
    enum._member_map_[member._name_] = enum._value2member_map_[WORD] = member
    enum._member_names_.append(member._name_)
    _OPTIMIZER_HANDLERS[member] = _settings_from
    if OptimizerNames(WORD) is not member or _OPTIMIZER_HANDLERS.get(WORD) is not _settings_from:
        raise RuntimeError(
            f'transformers {transformers.__version__} does not take optim="{WORD}" as 5.23 does. '
            "Use transformers 5.23."
        )


def check_words(args: Any) -> None:
    """Refuse ``optim_args`` that transformers would cut in the wrong places.

    Raises:
        ValueError: what stands between two commas is no name with a value.
    """
    if args.optim != WORD or not args.optim_args:
        return
    for word in args.optim_args.replace(" ", "").split(","):
        if word.count("=") != 1:
            raise ValueError(
                "optim_args are name=value between commas, which a value cannot hold; got "
                f"{word!r} in {args.optim_args!r}. Pass such settings, as roles are, by "
                "optimizer_cls_and_kwargs=flora_dist.transformers.flora(...)."
            )


def _settings_from(context: Any) -> tuple[type[FloraFactory], dict[str, Any]]:
    """What transformers asks for, from its ``OptimizerContext``."""
    given = {name: _value(word) for name, word in context.optim_args.items()}
    check_names(given)
    rates = {"lr": context.args.learning_rate, "weight_decay": context.args.weight_decay}
    return FloraFactory, {**rates, **given}


def _value(word: str) -> Any:
    """A word of ``optim_args`` as Python has it.

    >>> [_value(word) for word in ("8", "1e-3", "none", "blend", "True")]
    [8, 0.001, None, 'blend', True]
    """
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word

# SPDX-License-Identifier: Apache-2.0
"""What callers give a save: everyday values are taken, and what is refused all ranks refuse."""

from __future__ import annotations

import math
import re
from collections import OrderedDict, UserDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from flora_dist import checkpoint
from flora_dist.checkpoint.agreement import agreed
from tests.checkpoint.small import start
from tests.conftest import pool_of

STEPS = {"NumPy": numpy.int64(3), "a tensor": torch.tensor(3), "NumPy's array": numpy.array(3)}
TAKEN: dict[str, tuple[Any, Any]] = {
    "a proxy": (MappingProxyType({"a": 1}), {"a": 1}),
    "an ordered dict": (OrderedDict(a=UserDict(b=2)), {"a": {"b": 2}}),
    "NumPy's numbers": (
        {"i": numpy.int32(7), "f": numpy.float32(0.5), "d": numpy.float64(0.1)},
        {"i": 7, "f": 0.5, "d": 0.1},
    ),
    "tensors of one": (
        {"i": torch.tensor(7), "f": torch.tensor(0.5), "b": torch.tensor(True)},
        {"i": 7, "f": 0.5, "b": True},
    ),
    "words": ({"s": numpy.str_("x")}, {"s": "x"}),
    "none": (None, {}),
}


def deep(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a step between": ({"step": 3.0}, "step must be a whole number"),
    "a step in words": ({"step": "3"}, "step must be a whole number"),
    "a step that is true": ({"step": True}, "step must be a whole number"),
    "a step before 0": ({"step": -1}, "step must be a whole number"),
    "a step without end": ({"step": 10**30}, "step must be a whole number"),
    "two steps": ({"step": torch.tensor([1, 2])}, "step must be a whole number"),
    "keep in words": ({"keep": "2"}, "keep must be a whole number"),
    "keep nothing": ({"keep": numpy.int64(0)}, "keep must be 1 or more"),
    "a tag that is a path": ({"tag": Path("x")}, "tag must be a plain name"),
    "a tag that is a number": ({"tag": 3}, "tag must be a plain name"),
    "a list for extra": ({"extra": [1]}, "extra must be a table"),
    "a tuple": ({"extra": {"a": (1, 2)}}, "extra.a is a tuple"),
    "keys that are numbers": ({"extra": UserDict({1: 2})}, "the key 1 of extra"),
    "bytes": ({"extra": {"a": [b"x"]}}, r"extra\.a\[0\] is a bytes"),
    "a whole tensor": ({"extra": {"a": torch.ones(2)}}, "extra.a is a Tensor"),
    "a complex number": ({"extra": {"a": 1j}}, "extra.a is a complex"),
    "a deep list": ({"extra": {"a": deep(100_000)}}, "at most 64 levels"),
    "a list that holds itself": ({"extra": {"a": endless()}}, "at most 64 levels"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_whatever_counts_as_a_whole_number_is_a_step(kind: str, tmp_path: Path) -> None:
    one = start(data=0)
    path = checkpoint.save(tmp_path, one.model, one.optimizer, step=STEPS[kind], keep=STEPS[kind])
    assert path.name == "step-00000003"
    assert checkpoint.load(path, one.model, one.optimizer).step == 3


def test_everyday_values_of_extra_come_back_as_plain_ones(tmp_path: Path) -> None:
    one = start(data=0)
    for number, (given, expected) in enumerate(TAKEN.values()):
        path = checkpoint.save(tmp_path, one.model, one.optimizer, step=number, extra=given)
        found = checkpoint.load(path, one.model, one.optimizer).extra
        assert repr(found) == repr(expected)


def test_what_the_caller_changes_after_a_save_in_the_background_is_not_saved(
    tmp_path: Path,
) -> None:
    one, extra = start(data=0), {"list": [1]}
    saving = checkpoint.save_async(tmp_path, one.model, one.optimizer, step=1, extra=extra)
    extra["list"].append(2)
    assert checkpoint.load(saving.wait(), one.model, one.optimizer).extra == {"list": [1]}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_async])
def test_what_cannot_be_saved_is_refused_by_name_before_anything_is_written(
    what: str, save: Callable[..., Any], tmp_path: Path
) -> None:
    one, (given, said) = start(data=0), REFUSED[what]
    with pytest.raises(ValueError, match=said):
        save(tmp_path / "new", one.model, one.optimizer, **{"step": 1, **given})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, torch.tensor(math.nan)])
def test_a_rate_that_could_never_be_loaded_is_not_saved(
    name: str, value: Any, tmp_path: Path
) -> None:
    """A save with lr = NaN succeeded, and its checkpoint was refused ever after."""
    one = start(data=0)
    adam = torch.optim.AdamW(one.model.parameters())
    for optimizer in (one.optimizer, adam):
        optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            checkpoint.save(tmp_path / "new", one.model, optimizer, step=1)
    assert not (tmp_path / "new").exists()


# ---- on one rank alone


class _NoPickle(Exception):
    """What no pickle carries, so no message of a group."""

    def __reduce__(self) -> Any:
        raise TypeError("it stays here")


ERRORS = (RecursionError("deep"), KeyError("k"), _NoPickle("x"), AssertionError("a"))


def _said(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind of error that a call raised, and its text without the rank."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error).partition(" (found on")[0]
    return "", ""


def _raise(error: Exception) -> None:
    with agreed():
        if dist.get_rank() == 1:
            raise error


def _on_one_rank(folder: Path) -> list[tuple[str, str]]:
    """What each rank says of values that rank 1 alone gives, and of errors that it alone meets."""
    one, found = start(data=0), []
    for given, _ in REFUSED.values():
        mine = {"step": 1, **(given if dist.get_rank() == 1 else {})}
        for save in (checkpoint.save, checkpoint.save_async):
            call = partial(save, folder, one.model, one.optimizer, **mine)
            found.append(_said(call))
    return [*found, *(_said(partial(_raise, error)) for error in ERRORS)]


@pytest.mark.ranks(2)
def test_what_one_rank_alone_is_given_every_rank_refuses(tmp_path: Path) -> None:
    """``step=np.int64(3)`` raised on rank 0, and the others waited for their timeout."""
    first, second = pool_of(2)(_on_one_rank, tmp_path)
    values, errors = 2 * len(REFUSED), len(ERRORS)
    assert first[:values] == second[:values]
    for index, (_, said) in enumerate(REFUSED.values()):
        for kind, text in first[2 * index : 2 * index + 2]:
            assert kind == "ValueError"
            assert re.search(said, text)
    names = [type(error).__name__ for error in ERRORS]
    assert [kind for kind, _ in second[values:]] == names
    assert first[values:] == [
        ("RuntimeError", f"{name}: {error}") for name, error in zip(names, ERRORS, strict=True)
    ]
    assert len(first) == values + errors
    assert list(tmp_path.iterdir()) == []

# SPDX-License-Identifier: Apache-2.0
"""From YAML text and `--set` overrides to a `Config`; every mistake names its key."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from flora_dist.trainer.config import Config
from flora_dist.trainer.optimizers import LABELS, option_names
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.utf8 import read_utf8

with needs_train_extra():
    import yaml
    from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# Which of several mistakes is told: a key that is unknown or missing explains others.
_FIRST = ("unexpected_keyword_argument", "invalid_key", "missing")
_OURS = ("name", "decay")  # of an optimizer's section; the other keys go to the optimizer
# What other trainers call it, and its key here.
_ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "global_batch",
    "per_device_train_batch_size": "micro_batch",
    "max_steps": "steps",
    "max_length": "sequence_length",
    "gradient_clipping": "max_grad_norm",
    "output_dir": "folder",
    "bf16": "precision",
}
_TYPES = {
    "int_type": "int",
    "float_type": "float",
    "bool_type": "bool",
    "string_type": "str",
    "dict_type": "Mapping",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(
                f"a config key may appear only once; {twice[0]!r} appears twice, near line "
                f"{node.start_mark.line + 1}. Remove one."
            )
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 wants a dot and a signed exponent ("1.0e-3"); "1e-3" would arrive as a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `a.b=value` overrides and check the whole.

    Args:
        path: YAML file whose sections and keys are the fields of `Config`.
        overrides: dotted keys with a YAML value each, applied in order.

    Raises:
        ValueError: unknown key (names the nearest), wrong type, value out of range, a path
            that does not exist, or text that is not YAML.
    """
    if not path.is_file():
        raise ValueError(f"--config must name a file; {str(path)!r} is not a file. Check the path.")
    tree = _parse(read_utf8(path), subject=str(path))
    if not isinstance(tree, dict):
        raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all config errors
            f"a config must be a mapping of sections; {str(path)!r} holds {tree!r}. "
            "See configs/README.md."
        )
    for override in overrides:
        _override(tree, override)
    for section in ("optimizer", "compare"):
        if isinstance(tree.get(section), Mapping):
            tree[section] = _with_options(tree[section], section)
    try:
        return TypeAdapter(Config).validate_python(tree, context=path.parent)
    except ValidationError as error:
        raise ValueError(_explained(error)) from error


def as_tree(config: Config) -> dict[str, Any]:
    """The config as plain values, in the file's own form: `load_config` reads it back."""
    tree = dataclasses.asdict(config)
    for section in ("optimizer", "compare"):
        if tree[section] is not None:
            tree[section] |= {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in tree[section].pop("options").items()
            }
    return tree


def as_yaml(config: Config) -> str:
    """The config as the text of a config file."""
    return yaml.safe_dump(as_tree(config), sort_keys=False)


def _parse(text: str, *, subject: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(
            f"{subject} must be YAML; {error.problem}{where}. Correct the text."
        ) from error
    except yaml.YAMLError as error:  # a character that no YAML holds
        raise ValueError(
            f"{subject} must be YAML; {' '.join(str(error).split())}. Correct the text."
        ) from error


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(
            f"--set takes section.key=value; it got {override!r}. "
            "For example --set optimizer.rank=4."
        )
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        if not isinstance(tree[key], dict):
            raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all config errors
                f"--set {dotted} goes through {key!r}, which is not a section; its value is "
                f"{tree[key]!r}. Use the keys of configs/README.md."
            )
        tree = tree[key]
    tree[keys[-1]] = _parse(text, subject=f"the value of --set {dotted}")


def _with_options(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The optimizer's section: ours, and the rest checked against that optimizer's names."""
    name, ours = tree.get("name"), {key: tree[key] for key in _OURS if key in tree}
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in tree.items()
        if key not in _OURS
    }
    if name in list(LABELS):  # else it is refused as any other word would be
        known = option_names(name)
        for key in options:
            if key not in known:
                raise ValueError(_unknown(str(key), [*_OURS, *known], where))
    return {**ours, "options": options}


def _explained(error: ValidationError) -> str:
    """What to say of the first mistake."""
    mistakes = error.errors(include_url=False)
    kinds = [*_FIRST, *(mistake["type"] for mistake in mistakes)]
    mistake = min(mistakes, key=lambda each: kinds.index(each["type"]))
    where, value, context = ".".join(map(str, mistake["loc"])), mistake["input"], _context(mistake)
    match mistake["type"]:
        case "unexpected_keyword_argument" | "invalid_key":
            return _unknown_of(mistake)
        case "missing":
            return f"{where} is required and missing. Add it to the config."
        case "dataclass_type":
            remedy = "Indent its keys below it."
            return f"{where} must be a section with keys; it is {value!r}. {remedy}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Choose one."
            return f"{where} must be one of {', '.join(choices)}; it is {value!r}. {hint}"
        case "finite_number":
            return f"{where} must be finite; it is {value!r}. Correct the value."
        case "greater_than_equal":
            return f"{where} must be at least {context['ge']}; it is {value}. Raise it."
        case "value_error":
            return str(context["error"])
    kind = _TYPES.get(mistake["type"], mistake["msg"])
    return (
        f"{where} must be of type {kind}; it is {value!r} ({type(value).__name__}). Correct the "
        "value."
    )


def _context(mistake: ErrorDetails) -> dict[str, Any]:
    return mistake.get("ctx", {})


def _unknown_of(mistake: ErrorDetails) -> str:
    *where, key = map(str, mistake["loc"])
    kind: Any = Config
    for section in where:
        hint = get_type_hints(kind)[section]
        kind = next(filter(dataclasses.is_dataclass, get_args(hint)), hint)
    return _unknown(key, [each.name for each in dataclasses.fields(kind)], ".".join(where))


def _unknown(key: str, siblings: list[str], where: str) -> str:
    near = difflib.get_close_matches(key, siblings, n=1)
    here = _ELSEWHERE.get(key, key)
    nearest = [_dotted(where, name) for name in near] or [
        dotted for dotted in _all_keys() if dotted.rpartition(".")[2] == here
    ]
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return (
        f"a config holds only known keys; {_dotted(where, key)!r} is unknown. {hint}"
        f"Known here: {', '.join(siblings)}."
    )


def _all_keys() -> list[str]:
    keys = [f"optimizer.{name}" for name in option_names("flora")]
    for section, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            keys += [f"{section}.{f.name}" for f in dataclasses.fields(kind)]
    return keys


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key

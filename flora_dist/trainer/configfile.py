# SPDX-License-Identifier: Apache-2.0
"""From YAML text and `--set` overrides to a `Config`; every mistake names its key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flora_dist.trainer.config import AUTO, BYTE, STDLIB, Config, OptimizerConfig
from flora_dist.trainer.optimizers import option_names
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.utf8 import read_utf8

with needs_train_extra():
    import yaml


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
    return _with_paths(_build(Config, tree, ""), path.parent)


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
    except yaml.YAMLError as error:
        raise ValueError(f"{subject} must be YAML: {error}. Correct the text.") from error


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


def _build(kind: type[Any], tree: Any, where: str) -> Any:
    """A dataclass from a mapping; `where` is the dotted path of the section."""
    if not isinstance(tree, Mapping):
        raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all config errors
            f"{where} must be a section with keys; it is {tree!r}. Indent its keys below it."
        )
    if kind is OptimizerConfig:
        tree = _with_options(tree, where)
    types_ = get_type_hints(kind)
    for key in tree:
        if key not in types_:
            raise _unknown(str(key), list(types_), where)
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in tree:
            raise ValueError(
                f"{_dotted(where, name)} is required and missing. Add it to the config."
            )
    return kind(
        **{key: _convert(value, types_[key], _dotted(where, key)) for key, value in tree.items()}
    )


def _with_options(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The optimizer's section: `name`, and the rest checked against that optimizer's names."""
    name = _convert(tree.get("name"), get_type_hints(OptimizerConfig)["name"], f"{where}.name")
    known = option_names(name)
    for key in tree:
        if key != "name" and key not in known:
            raise _unknown(str(key), ["name", *known], where)
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in tree.items()
        if key != "name"
    }
    return {"name": name, "options": options}


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Check one value against its annotation; ints become floats where a float is meant."""
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{where} must be one of {', '.join(choices)}; it is {value!r}."
                f"{hint or ' Choose one.'}"
            )
        return value
    if get_origin(kind) in {Union, types.UnionType}:
        if value is None and type(None) in choices:
            return None
        (kind,) = (choice for choice in choices if choice is not type(None))
        return _convert(value, kind, where)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    plain = get_origin(kind) or kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(
            f"{where} must be of type {plain.__name__}; it is {value!r} "
            f"({type(value).__name__}). Correct the value."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite; it is {value!r}. Correct the value.")
    return value


def _unknown(key: str, siblings: list[str], where: str) -> ValueError:
    near = difflib.get_close_matches(key, siblings, n=1)
    nearest = [_dotted(where, name) for name in near] or [
        dotted for dotted in _all_keys() if dotted.rpartition(".")[2] == key
    ]
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(
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


def _with_paths(config: Config, folder: Path) -> Config:
    """Find every path: from the working directory, else from the config file's own folder."""

    def found(value: str | None, key: str, reserved: str | None = None) -> str | None:
        if value is None or value == reserved:
            return value
        for candidate in (Path(value), folder / value):
            if candidate.exists():
                return str(candidate)
        also = f" (the one built in is {reserved!r})" if reserved else ""
        raise ValueError(
            f"{key} must name something that exists; {value!r} does not, neither in the working "
            f"directory nor in {str(folder)!r}. Correct the path{also}."
        )

    change = dataclasses.replace
    model, data, backend = config.model, config.data, config.backend
    checkpoint = config.checkpoint
    return change(
        config,
        model=change(
            model,
            config=found(model.config, "model.config"),
            pretrained=found(model.pretrained, "model.pretrained"),
        ),
        data=change(
            data,
            corpus=found(data.corpus, "data.corpus", STDLIB),
            tokenizer=found(data.tokenizer, "data.tokenizer", BYTE),
        ),
        backend=change(backend, config=found(backend.config, "backend.config")),
        checkpoint=change(checkpoint, resume=found(checkpoint.resume, "checkpoint.resume", AUTO)),
    )

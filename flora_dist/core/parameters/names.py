# SPDX-License-Identifier: Apache-2.0
"""Names of an optimizer's parameters: canonical, one per tensor, equal on every layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flora_dist.core.sketch.keys import canonical_name

Named = tuple[str, Tensor]


def tidy_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a parameter group with its parameters in a list, tied ones once.

    A tensor under several names keeps the smallest canonical one: which name comes first depends
    on how a framework walks the model.
    """
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, (set, frozenset)):
        raise TypeError(
            "parameters must come in an order that is equal on all ranks; got a set. Pass a list."
        )
    params = list(params)
    if group.get("param_names") is not None:
        params = _named_apart(params, group["param_names"])
    group = {key: value for key, value in group.items() if key != "param_names"}
    _check_entries(params)
    if not all(isinstance(entry, tuple) for entry in params):
        return {**group, "params": list({id(tensor): tensor for tensor in params}.values())}
    names: dict[int, Named] = {}
    for name, tensor in params:
        kept = names.get(id(tensor))
        if kept is None or canonical_name(name) < canonical_name(kept[0]):
            names[id(tensor)] = (name, tensor)
    return {**group, "params": list(names.values())}


def _named_apart(params: list[Any], names: Iterable[Any]) -> list[Any]:
    """Parameters and the names that stand beside them, as torch keeps both in its groups."""
    names = list(names)
    if any(isinstance(entry, tuple) for entry in params):
        raise ValueError(
            "a group's parameters must be named once; this one has (name, parameter) in params, "
            "and param_names too. Leave param_names out."
        )
    if len(names) != len(params):
        raise ValueError(
            f"a group must have as many param_names as parameters; it has {len(names)} for "
            f"{len(params)}. Pass params as (name, parameter)."
        )
    return list(zip(names, params, strict=True))


def _check_entries(params: Iterable[Any]) -> None:
    for entry in params:
        if isinstance(entry, tuple) and not (len(entry) == 2 and isinstance(entry[0], str)):
            raise TypeError(
                "a named parameter must be a pair of a string and a tensor; got "
                f"({', '.join(type(part).__name__ for part in entry)}). Pass "
                "model.named_parameters()."
            )


def as_groups(params: Any) -> list[dict[str, Any]]:
    """What ``torch.optim`` accepts (tensors, named tensors, groups) as a list of groups."""
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an iterable of parameters, of (name, parameter) or of groups; got one "
            "tensor. Pass model.named_parameters()."
        )
    if isinstance(params, (set, frozenset)):
        return [tidy_group({"params": params})]
    entries = list(params)
    if entries and isinstance(entries[0], Mapping):
        return [dict(entry) for entry in entries]
    if not entries:
        raise ValueError(
            "params must hold at least one parameter; it is empty. Was a generator used up? Pass "
            "model.named_parameters() anew."
        )
    return [tidy_group({"params": entries})]


def by_positions(params: Any) -> list[dict[str, Any]]:
    """Groups whose parameters are named by their places among all.

    >>> [group["params"][0][0] for group in by_positions([Tensor(2, 2)])]
    ['#0']
    """
    groups, position = [], 0
    for group in as_groups(params):
        tensors = tidy_group(group)["params"]
        names = [position_name(position + index) for index in range(len(tensors))]
        groups.append({**group, "params": list(zip(names, tensors, strict=True))})
        position += len(tensors)
    return groups


def are_named(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the parameters were given with names; torch has all groups alike."""
    return all("param_names" in group for group in groups)


def give_names(
    groups: Sequence[dict[str, Any]], model: nn.Module, state: Mapping[Any, Any]
) -> None:
    """Name the parameters of all groups as a model does: tied ones by the smallest canonical name.

    Raises:
        ValueError: a parameter is not the model's, or there is ``state`` made without names.
    """
    if state:
        raise ValueError(
            "names must be taken before the first step; this optimizer has state that follows "
            "from positions. Build it from model.named_parameters()."
        )
    found: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        known = found.get(id(tensor))
        if known is None or canonical_name(name) < canonical_name(known):
            found[id(tensor)] = name
    for tensor in (tensor for group in groups for tensor in group["params"]):
        if id(tensor) not in found:
            raise ValueError(
                "every parameter of the optimizer must belong to the model that names it; one of "
                f"shape {tuple(tensor.shape)} does not. Pass the model that is trained, after "
                "sharding."
            )
    names = [[found[id(tensor)] for tensor in group["params"]] for group in groups]
    check_unique(canonical_name(name) for own in names for name in own)
    for group, own in zip(groups, names, strict=True):
        group["param_names"] = own


def tensors_of(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group before or after torch has taken the names out."""
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]


def names_of(groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The canonical name of each parameter, group after group; positions where there are none."""
    position = 0
    for group in groups:
        given = group.get("param_names")
        for index, entry in enumerate(group["params"]):
            name = given[index] if given else entry[0] if isinstance(entry, tuple) else None
            yield position_name(position) if name is None else canonical_name(name)
            position += 1


def position_name(position: int) -> str:
    """The name of a parameter that was given none.

    >>> position_name(3)
    '#3'
    """
    return f"#{position}"


def check_unique(names: Iterable[str]) -> None:
    """Refuse two parameters with one name: they would share every projection."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"parameter names must differ; {name!r} names two parameters (after removing the "
                "prefixes of wrappers). Rename one, or pass each once."
            )
        seen.add(name)

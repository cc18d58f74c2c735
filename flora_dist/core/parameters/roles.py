# SPDX-License-Identifier: Apache-2.0
"""What a parameter is to its model, by its name, and settings by role or by pattern of names.

Roles matter because momentum does not: SCALE (arXiv 2506.16659) gives it to the head alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from flora_dist.core.parameters.names import tidy_group
from flora_dist.core.sketch.keys import canonical_name

ROLES = ("head", "embedding", "value", "other")
"""``head``: what gives the logits; ``embedding``: rows that are looked up, by token or by place;
``value``: attention's values, where they are a matrix of their own; ``other``: all else."""

# The last module before ".weight", as models of transformers, torchvision and Meta's name it.
_LAST = {
    "head": r"(lm_head|embed_out|output|head|heads|classifier|score|out_proj_head|decoder)",
    "embedding": r"(\w*embed\w*|wte|wpe|shared|emb)",
    "value": r"(v|v_proj|value|value_proj|w_v|wv|to_v|v_lin)",
}
_HEADS_ABOVE = r"(cls|classifier|lm_head|head|heads)\."
"""A head of several layers: all of them are."""


def role_of(name: str) -> str:
    """The role of a parameter, by its canonical name alone.

    A tied weight has one name, and so one role: that of the smallest of its names.

    >>> [role_of(n) for n in ("lm_head.weight", "model.embed_tokens.weight", "h.0.mlp.up.weight")]
    ['head', 'embedding', 'other']
    """
    module = name.removesuffix(".weight").removesuffix(".bias")
    if re.match(_HEADS_ABOVE, module):
        return "head"
    last = module.rpartition(".")[2]
    return next((role for role, words in _LAST.items() if re.fullmatch(words, last)), "other")


def split(
    groups: Sequence[Mapping[str, Any]], roles: Mapping[str, Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The groups, each cut in one for each entry of ``roles`` that some of its parameters meet.

    The first pattern that matches a name decides, else its role. Settings that a group names itself
    stay as they are.

    Raises:
        ValueError: a key is neither a role nor a pattern, or a parameter has no name.
    """
    if not roles:
        return [dict(group) for group in groups]
    for key, settings in roles.items():
        _check_entry(key, settings)
    return [part for group in groups for part in _parts(group, roles)]


def _parts(
    group: Mapping[str, Any], roles: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    tidy = tidy_group(group)
    parts: dict[str | None, list[Any]] = {}
    for entry in tidy["params"]:
        if not isinstance(entry, tuple):
            raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all of them
                "roles are known by names; a group has parameters without. Pass "
                "model.named_parameters()."
            )
        parts.setdefault(_entry_of(canonical_name(entry[0]), roles), []).append(entry)
    return [
        {**(roles[key] if key is not None else {}), **tidy, "params": entries}
        for key, entries in parts.items()
    ]


def _entry_of(name: str, roles: Mapping[str, Mapping[str, Any]]) -> str | None:
    for key in roles:
        if key not in ROLES and fnmatchcase(name, key):
            return key
    role = role_of(name)
    return role if role in roles else None


def _check_entry(key: str, settings: Any) -> None:
    if not isinstance(settings, Mapping) or "params" in settings:
        raise ValueError(
            f"an entry of roles must be settings by name; {key!r} has {settings!r}. "
            "Pass a dict such as {'rank': None}."
        )
    if key in ROLES or re.search(r"[*?\[.]", key):
        return
    near = difflib.get_close_matches(key, ROLES, n=1, cutoff=0.75)
    hint = f"Did you mean {near[0]!r}?" if near else f"Pass '*{key}*' for a pattern."
    raise ValueError(
        f"roles must name a role ({', '.join(ROLES)}) or a pattern of names with '*' or '.'; "
        f"got {key!r}. {hint}"
    )

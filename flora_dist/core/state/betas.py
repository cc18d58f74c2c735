# SPDX-License-Identifier: Apache-2.0
"""Adam's name for two of a group's settings. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BETAS = ("beta1", "beta2")


def from_betas(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group in which ``betas=(beta1, beta2)``, as Adam has them, are beta1 and beta2.

    >>> from_betas({"betas": (0.9, 0.95), "lr": 1e-3})
    {'lr': 0.001, 'beta1': 0.9, 'beta2': 0.95}
    """
    betas = settings.get("betas")
    rest = {name: value for name, value in settings.items() if name != "betas"}
    if betas is None or betas == ():
        return rest
    if not isinstance(betas, (tuple, list)) or len(betas) != len(_BETAS):
        raise ValueError(f"betas must be (beta1, beta2); got {betas!r}. Pass two numbers.")
    twice = [name for name in _BETAS if rest.get(name) is not None]
    if twice:
        raise ValueError(
            f"betas says beta1 and beta2 already; got betas={betas!r} and "
            f"{twice[0]}={rest[twice[0]]!r}. Leave one of them out."
        )
    return {**rest, **dict(zip(_BETAS, betas, strict=True))}


def take_betas(group: dict[str, Any]) -> None:
    """Let what a scheduler has left in a group's "betas", where it has, be its beta1.

    torch's OneCycleLR and CyclicLR and DeepSpeed's OneCycle cycle the first of two numbers there,
    where an optimizer's defaults have the key; the second, DeepSpeed's own 0.99, is not theirs.
    """
    group["beta1"], group["betas"] = group["betas"][0], ()

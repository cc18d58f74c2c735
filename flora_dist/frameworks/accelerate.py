# SPDX-License-Identifier: Apache-2.0
"""Accelerate: sketched gradients in one line after ``prepare``, clipping with them.

``accelerator.clip_grad_norm_`` (accelerate 1.15) takes torch's norm of gradients, and sketches have
no elements for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from flora_dist.flora import Flora
from flora_dist.frameworks.inside import unwrapped
from flora_dist.gradients.attach import Handle
from flora_dist.gradients.attach import attach as attach_to_model


def attach(
    accelerator: Any, model: nn.Module, optimizer: Any, gradients: str, **settings: Any
) -> Handle:
    """Keep gradients as sketches, and let ``accelerator.clip_grad_norm_`` clip by Flora's norm.

    Args:
        accelerator: the one that has prepared both.
        model: as ``accelerator.prepare`` returned it.
        optimizer: likewise, or the Flora inside.
        gradients: the level, as ``flora_dist.attach`` has it.
        settings: the rest of its arguments.

    Returns:
        Its handle.

    Raises:
        TypeError: the optimizer is not Flora.
        ValueError: what ``flora_dist.attach`` refuses: under DeepSpeed the level stands in the
            config.
    """
    flora = unwrapped(optimizer)
    handle = attach_to_model(model, flora, gradients, **settings)
    accelerator.clip_grad_norm_ = partial(_clip, flora, accelerator.clip_grad_norm_)
    return handle


def _clip(
    flora: Flora,
    otherwise: Any,
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2,
) -> Any:
    """Clip what Flora trains; other parameters are clipped as before.

    Raises:
        ValueError: another norm than the Euclidean one.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if _trained(given) != _trained(p for group in flora.param_groups for p in group["params"]):
        return otherwise(given, max_norm, norm_type=norm_type)
    if norm_type != 2:
        raise ValueError(
            "sketches estimate the Euclidean norm of a gradient and no other; "
            f"accelerator.clip_grad_norm_ got norm_type={norm_type}. Leave norm_type at 2."
        )
    return flora.clip_grad_norm_(max_norm)


def _trained(parameters: Iterable[Tensor]) -> set[int]:
    return {id(parameter) for parameter in parameters if parameter.requires_grad}

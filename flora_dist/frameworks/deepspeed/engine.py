# SPDX-License-Identifier: Apache-2.0
"""An engine with Flora from a DeepSpeed config: build, attach, hand back what DeepSpeed gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deepspeed
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from torch import nn
from torch.optim import Optimizer

from flora_dist.core.parameters import names as naming
from flora_dist.core.records import FEW_BITS
from flora_dist.flora import Flora
from flora_dist.frameworks.build_lock import telling
from flora_dist.frameworks.deepspeed.attach import attach
from flora_dist.frameworks.deepspeed.config import (
    check_features,
    check_filled_in,
    check_flora_block,
    gradient_request,
    optimizer_settings,
    prepared,
)
from flora_dist.frameworks.deepspeed.masters import with_states

BuildOptimizer = Callable[[Any], Optimizer]
Engine = tuple[Any, Any, Any, Any]
"""What ``deepspeed.initialize`` returns: engine, optimizer, data loader, scheduler."""


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Flora | BuildOptimizer | None = None,
    model_parameters: Any = None,
    config: str | dict[str, Any] | None = None,
    config_params: str | dict[str, Any] | None = None,
    **more: Any,
) -> Engine:
    """``deepspeed.initialize`` with Flora: same arguments, same results.

    The optimizer is the one given (a Flora, or a callable that makes one), else built from the
    config: ``"optimizer": {"type": "Flora", "params": {"lr": 1e-3, "rank": 8}}``, over
    ``model_parameters`` or all parameters that need a gradient. ``"flora": {"gradients":
    "compressed"}`` says what is compressed of the gradients: "dense" nothing, "compressed" what is
    kept and sent, "fused" also what linear layers form; ``"gradient_bits"``, ``"wire_bits"``,
    ``"gradient_rank"`` and ``"wire_dtype"`` beside it are those of ``flora_dist.attach``.
    ``zero_allow_untested_optimizer`` and ``zero_force_ds_cpu_optimizer`` are set.

    Args:
        args: an object with ``deepspeed_config``, where ``config`` is not given.
        model: the module, before any wrapper.
        optimizer: overrides the config's.
        model_parameters: parameters, named parameters or groups.
        config: a path, or the config itself.
        config_params: older name of ``config``.
        more: passed on as they are: ``training_data``, ``lr_scheduler``, ``mpu`` and others.

    Returns:
        engine, ZeRO's optimizer, data loader, scheduler; the last two None where not asked for.

    Raises:
        ValueError: an unknown key or setting, with the nearest known one; an "auto"; a feature
            that would be computed wrong; under `flora-dist launch`, a lock that a killed
            compilation has left.
        TypeError: another optimizer than Flora.
    """
    if model is None:
        raise ValueError("initialize needs a model; got None. Pass model=.")
    args, settings = settings_of(args, config if config is not None else config_params)
    return build(
        # Past what flora_dist.register may have put around it, which would build and attach too.
        getattr(deepspeed.initialize, "__wrapped__", deepspeed.initialize),
        settings,
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        **more,
    )


def build(
    host: Callable[..., Engine],
    settings: dict[str, Any],
    *,
    model: nn.Module,
    optimizer: Flora | BuildOptimizer | None,
    model_parameters: Any,
    **more: Any,
) -> Engine:
    """``initialize`` by ``host``, which is DeepSpeed's own, from a config that has been read."""
    check_filled_in(settings)
    check_features(settings)
    check_flora_block(settings)
    with_states(settings)
    if optimizer is None:
        optimizer = by_settings(model, model_parameters, optimizer_settings(settings))
    elif isinstance(optimizer, Optimizer) and not isinstance(optimizer, Flora):
        raise TypeError(
            f"flora_dist.deepspeed.initialize runs Flora; got {type(optimizer).__name__}. Use "
            "deepspeed.initialize for it."
        )
    if isinstance(optimizer, Flora):
        _check_owned(optimizer.param_groups, model)
        _check_gradient_rank(optimizer, settings)
    with telling():
        results = host(
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            config={**prepared(settings), **with_states(settings)},
            **more,
        )
    attach(results[0])
    return results


def by_settings(model: nn.Module, given: Any, settings: dict[str, Any]) -> Flora:
    """The config's Flora, over the given parameters or all that need a gradient.

    Roles go by names, which parameters that a caller hands over need not have: the model has them,
    as ``attach`` will read them.
    """
    if given is None:
        given = [p for p in model.parameters() if p.requires_grad]
    if not settings.get("roles"):
        return Flora(given, **settings)
    groups = [naming.tidy_group(group) for group in naming.as_groups(given)]
    _check_owned(groups, model)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        group["params"] = [(names[id(p)], p) for p in naming.tensors_of(group)]
    return Flora(groups, **settings)


def _check_owned(groups: Iterable[Mapping[str, Any]], model: nn.Module) -> None:
    """Refuse parameters of another module: DeepSpeed's own error does not name the cause."""
    own = set(map(id, model.parameters()))
    for group in groups:
        for tensor in naming.tensors_of(group):
            if id(tensor) not in own:
                raise ValueError(
                    "every parameter of the optimizer must belong to the model; one of shape "
                    f"{tuple(tensor.shape)} does not. Make its module part of the model."
                )


def _check_gradient_rank(optimizer: Flora, config: dict[str, Any]) -> None:
    """Refuse a rank that blocks cannot have before DeepSpeed builds anything."""
    request = gradient_request(config)
    rank, few = request.gradient_rank, request.bits in FEW_BITS
    for group in optimizer.param_groups:
        block = group["block"]
        if rank is not None and block != "full" and rank >= block + few:
            rule = "must not exceed" if few else "must be below"
            raise ValueError(
                f'"flora"."gradient_rank" {rule} block; got {rank}, and a group with '
                f"block={block}. Lower it, or raise block."
            )


def settings_of(args: Any, config: str | dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The config as a dict, and ``args`` without it: DeepSpeed takes one of the two."""
    named = getattr(args, "deepspeed_config", None)
    if (config is None) == (named is None):
        given = "both" if named is not None else "neither"
        raise ValueError(
            f"initialize takes config= or args.deepspeed_config; got {given}. Pass one of them."
        )
    if named is not None:
        args, config = copy.copy(args), named
        args.deepspeed_config = None
    loaded: dict[str, Any] = config if isinstance(config, dict) else load_ds_config(config)
    return args, loaded

# SPDX-License-Identifier: Apache-2.0
"""Engines that others build: ``deepspeed.initialize`` itself learns what Flora needs.

Accelerate, the Hugging Face Trainer and Lightning look ``deepspeed.initialize`` up when they call
it, and the Trainer loads a checkpoint before any callback runs. So attaching belongs inside that
call: later is too late to resume.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from torch import nn

from flora_dist.core.comm.groups import process_rank
from flora_dist.flora import Flora
from flora_dist.frameworks.deepspeed.attach import attach
from flora_dist.frameworks.deepspeed.config import TYPE
from flora_dist.frameworks.deepspeed.engine import Engine, build, settings_of

ADAMS = {"betas": [0.9, 0.999], "eps": 1e-8}
"""What the Trainer writes for "auto" unless its arguments say otherwise: Adam's defaults."""
_MARK = "joined_by_flora"
_OURS = ("sketch", "kappa", "transfer")
"""Keys of a parameter group that no other optimizer has."""


def join() -> None:
    """Let ``deepspeed.initialize`` prepare configs for Flora and attach it; once per process."""
    if not hasattr(deepspeed.initialize, _MARK):
        deepspeed.initialize = _joined(deepspeed.initialize)


def _joined(host: Callable[..., Engine]) -> Callable[..., Engine]:
    signature = inspect.signature(host)

    @functools.wraps(host)
    def initialize(*args: Any, **kwargs: Any) -> Engine:
        call = signature.bind(*args, **kwargs).arguments
        if isinstance(call.get("model"), nn.Module):
            return _initialize(host, call)
        return host(**call)  # whose error it is

    setattr(initialize, _MARK, True)
    return initialize


def _initialize(host: Callable[..., Engine], call: dict[str, Any]) -> Engine:
    optimizer = call.get("optimizer")
    if isinstance(optimizer, Flora) or (optimizer is None and _names_flora(call)):
        config = call.get("config") if call.get("config") is not None else call.get("config_params")
        args, settings = settings_of(call.get("args"), config)
        given = {k: v for k, v in call.items() if k not in ("args", "config", "config_params")}
        given = {"optimizer": None, "model_parameters": None, "args": args, **given}
        return build(host, without_adams(settings), **given)
    _check_not_swapped(optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_none_dropped(call["model"], optimizer)
    results = host(**call)
    if isinstance(getattr(results[1], "optimizer", results[1]), Flora):  # of a callable
        attach(results[0])
    return results


def _names_flora(call: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed would look Flora up by name."""
    named = getattr(call.get("args"), "deepspeed_config", None)
    given = [call.get("config"), call.get("config_params"), named]
    config: Any = next((each for each in given if each is not None), {})
    settings = config if isinstance(config, Mapping) else load_ds_config(config)
    block = settings.get("optimizer")
    return isinstance(block, Mapping) and block.get("type") == TYPE


def without_adams(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config without what "auto" became in Flora's block for Adam; says so once.

    1e-8 beside Adam's |g| is nothing, beside Flora's g^2 it is most of it: gradients below 1e-4
    would hardly move a weight. Other values are somebody's own, and are read or refused as such.
    """
    settings = {**config}
    block = settings.get("optimizer")
    if not isinstance(block, Mapping) or block.get("type") != TYPE:
        return settings
    params = {**block.get("params", {})}
    dropped = {k: params.pop(k) for k, adams in ADAMS.items() if _is_adams(params.get(k), adams)}
    settings["optimizer"] = {**block, "params": params}
    if dropped and process_rank() == 0:
        words = ", ".join(f"{key}={value}" for key, value in dropped.items())
        sys.stderr.write(
            f"Flora: left {words} out of the optimizer block, as the Trainer fills them in for "
            "Adam; write beta1, beta2 or eps there to set Flora's own\n"
        )
    return copy.deepcopy(settings)


def _is_adams(value: Any, adams: Any) -> bool:
    return value is not None and (list(value) if isinstance(value, tuple) else value) == adams


# ---- Floras that hosts lose on the way


def _check_not_swapped(optimizer: Any) -> None:
    """Refuse another optimizer in Flora's groups.

    Accelerate 1.15 turns every optimizer it is given beside offload into DeepSpeedCPUAdam, over the
    same groups (accelerate/utils/deepspeed.py, ``map_pytorch_optim_to_deepspeed``).

    Raises:
        ValueError: it was swapped.
    """
    groups = getattr(optimizer, "param_groups", None) or [{}]
    if not isinstance(optimizer, Flora) and set(_OURS) <= set(groups[0]):
        raise ValueError(
            f"the engine must be given the Flora that was built; it gets {type(optimizer).__name__}"
            ", which accelerate puts in place of any optimizer where the optimizer is offloaded. "
            'Set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config.'
        )


def _check_none_dropped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse to train with another optimizer where a Flora stands ready for the same parameters.

    Under DeepSpeed the Hugging Face Trainer sets what it was given as ``optimizers=`` to None and
    builds AdamW (transformers/integrations/deepspeed.py, ``deepspeed_init``). Nobody refers to the
    Flora any more but the script, so it is looked for among all objects.

    Raises:
        ValueError: there is one, which has not stepped yet.
    """
    if isinstance(optimizer, Flora):
        return
    own = set(map(id, model.parameters()))
    for flora in [found for found in gc.get_objects() if type(found) is Flora]:
        if not flora.state and any(id(p) in own for g in flora.param_groups for p in g["params"]):
            raise ValueError(
                f"this engine would train with {type(optimizer).__name__}, but a Flora was built "
                "for its parameters: under DeepSpeed the Hugging Face Trainer drops optimizers=. "
                "Pass optimizer_cls_and_kwargs=flora_dist.transformers.flora(...) instead; if the "
                "other optimizer is meant, delete the Flora first."
            )

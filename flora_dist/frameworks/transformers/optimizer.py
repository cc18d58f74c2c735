# SPDX-License-Identifier: Apache-2.0
"""Flora as the Hugging Face Trainer builds an optimizer, with names and the Trainer's own rates.

The Trainer (transformers 5.23) calls anything that is no optimizer class as
``cls()(model, **settings)``. That call has the model, and so the names; the Trainer's arguments are
found by the model, which a callback enters when a Trainer is made.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from flora_dist.flora import Flora

_SETTINGS = tuple(name for name in inspect.signature(Flora).parameters if name != "params")
arguments_of: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""The TrainingArguments of each Trainer's model."""
built_for: WeakKeyDictionary[nn.Module, Flora] = WeakKeyDictionary()
"""The Flora that was made last for each model."""


def flora(**settings: Any) -> tuple[type[FloraFactory], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, on any number of processes.

    Parameters have the model's names. ``lr`` and ``weight_decay`` are the Trainer's
    ``learning_rate`` and ``weight_decay`` unless given; as with the Trainer's own optimizers,
    biases and norms do not decay.

    Args:
        settings: of ``Flora``.

    Raises:
        ValueError: an unknown setting.
    """
    check_names(settings)
    return FloraFactory, settings


def check_names(settings: Mapping[str, Any]) -> None:
    """Refuse a setting that Flora does not have, with the nearest one it has."""
    for name in settings:
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(_SETTINGS)}."
            raise ValueError(f"Flora has no setting {name!r}. {hint}")


class FloraFactory:
    """Makes a Flora over a Trainer's model."""

    def __call__(self, model: nn.Module, **settings: Any) -> Flora:
        """Two groups, with and without weight decay, as ``Trainer.create_optimizer`` has them.

        Raises:
            ValueError: no ``lr`` or no ``weight_decay``, and no Trainer known for this model.
        """
        rates = {"lr": "learning_rate", "weight_decay": "weight_decay"}
        for name, argument in rates.items():
            if settings.get(name) is None:
                settings[name] = getattr(_arguments_for(model, name), argument)
        trainer: Any = Trainer  # the method asks nothing of its own Trainer
        decaying = set(trainer.get_decay_parameter_names(None, model))
        decay = settings.pop("weight_decay")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [pair for pair in named if pair[0] in decaying], "weight_decay": decay},
            {"params": [pair for pair in named if pair[0] not in decaying], "weight_decay": 0.0},
        ]
        optimizer = Flora([group for group in groups if group["params"]], **settings)
        prepare_deepspeed()
        built_for[model] = optimizer
        return optimizer


def _arguments_for(model: nn.Module, name: str) -> Any:
    # FSDP1 has wrapped the model by then.
    found = next((arguments_of[m] for m in model.modules() if m in arguments_of), None)
    if found is None:
        raise ValueError(
            f"Flora takes {name} from the Trainer of this model, and none is known, as with "
            f"model_init=; pass {name}= to flora_dist.transformers.flora()."
        )
    return found


def prepare_deepspeed(**flora_block: Any) -> None:
    """Under DeepSpeed, let its engine be built with Flora and attached.

    accelerate looks at the config before it calls DeepSpeed, so the key that keeps it from
    putting DeepSpeedCPUAdam in Flora's place has to be there by now.

    Args:
        flora_block: what the config's block "flora" shall say unless it has one.
    """
    if not is_under_deepspeed():
        return
    from flora_dist.frameworks.deepspeed.joining import join

    config = AcceleratorState().deepspeed_plugin.deepspeed_config
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    if flora_block:
        config.setdefault("flora", flora_block)
    join()


def is_under_deepspeed() -> bool:
    """Whether accelerate runs this process under DeepSpeed."""
    state = AcceleratorState._shared_state  # asking an instance would make the state
    return bool(state.get("distributed_type") == DistributedType.DEEPSPEED)

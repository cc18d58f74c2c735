# SPDX-License-Identifier: Apache-2.0
"""A Trainer whose gradients are kept as sketches, with Flora's clipping and norm.

The Trainer computes a norm of the gradients at every step, at ``max_grad_norm=0`` too, and sketches
have no elements for torch to take it of. Overrides four methods of transformers 5.23's Trainer.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import Trainer

from flora_dist.core.state.spec import LEVELS
from flora_dist.flora import Flora
from flora_dist.frameworks.inside import unwrapped
from flora_dist.frameworks.transformers.optimizer import is_under_deepspeed, prepare_deepspeed
from flora_dist.gradients.attach import attach

_OVERRIDDEN = (
    "_prepare_for_training",
    "_load_optimizer_and_scheduler",
    "_clip_grad_norm",
    "_get_grad_norm",
)


class SketchedGradients:
    """Put before a Trainer's class: ``class Mine(SketchedGradients, SFTTrainer): pass``."""

    def __init__(
        self,
        *args: Any,
        gradients: str = LEVELS[0],
        gradient_rank: int | None = None,
        gradient_bits: int | None = None,
        wire_bits: int | None = None,
        wire_dtype: str = "float32",
        bucket_cap_mb: float | None = None,
        **more: Any,
    ) -> None:
        """A Trainer's arguments, and those of ``flora_dist.attach``.

        Raises:
            RuntimeError: this version of transformers steps in another way.
        """
        for name in _OVERRIDDEN:
            if not hasattr(Trainer, name):
                raise RuntimeError(
                    f"transformers {transformers.__version__} has no Trainer.{name}, by which "
                    "sketched gradients are attached and clipped. Use transformers 5.23."
                )
        super().__init__(*args, **more)
        self._level = gradients
        self._how: dict[str, Any] = {
            "gradient_rank": gradient_rank,
            "gradient_bits": gradient_bits,
            "wire_bits": wire_bits,
            "wire_dtype": wire_dtype,
            "bucket_cap_mb": bucket_cap_mb,
        }
        if gradients != LEVELS[0] and is_under_deepspeed():
            given = {key: value for key, value in self._how.items() if value is not None}
            prepare_deepspeed(gradients=gradients, **given)

    @property
    def _sketches(self) -> bool:
        """Whether this Trainer attaches; an engine of DeepSpeed's follows its config."""
        return self._level != LEVELS[0] and not is_under_deepspeed()

    def _prepare_for_training(self, *args: Any) -> Any:
        host: Any = super()
        prepared = host._prepare_for_training(*args)
        self._attach()
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        # State of sketched gradients loads into an optimizer that has them, and the model is
        # wrapped by now.
        host: Any = super()
        self._attach()
        host._load_optimizer_and_scheduler(checkpoint)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        host: Any = super()
        if not self._sketches:
            return host._clip_grad_norm(model)
        own: Any = self
        return self._flora().clip_grad_norm_(own.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        host: Any = super()
        if not self._sketches or grad_norm is not None:
            return host._get_grad_norm(model, grad_norm)
        return self._flora().grad_norm()

    def _flora(self) -> Flora:
        own: Any = self
        found = unwrapped(own.optimizer)
        if not isinstance(found, Flora):
            raise TypeError(
                f"sketched gradients need Flora; this Trainer has {type(found).__name__}. Pass "
                "optimizer_cls_and_kwargs=flora_dist.transformers.flora(...)."
            )
        return found

    def _attach(self) -> None:
        own: Any = self
        if self._sketches:
            attach(own.model_wrapped, self._flora(), self._level, **self._how)


class FloraTrainer(SketchedGradients, Trainer):
    """``Trainer(..., gradients="compressed")``.

    Under DeepSpeed the arguments become the config's block "flora", unless it has one.
    """

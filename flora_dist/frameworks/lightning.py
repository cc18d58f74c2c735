# SPDX-License-Identifier: Apache-2.0
"""Lightning: sketched gradients by one callback.

Lightning 2.6 restores optimizers after ``on_fit_start``, which has the wrapped model, and clips in
the module's ``configure_gradient_clipping``, by torch's norm, which sketches do not have.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from flora_dist.flora import Flora
from flora_dist.frameworks.inside import unwrapped
from flora_dist.gradients.attach import Handle, attach
from flora_dist.gradients.request import SketchRequest

_HOOK = "configure_gradient_clipping"


class SketchedGradients(Callback):  # type: ignore[misc]  # its types are not looked at
    """``Trainer(callbacks=[SketchedGradients("compressed")], gradient_clip_val=1.0)``.

    A module with a ``configure_gradient_clipping`` of its own keeps it.
    """

    def __init__(self, gradients: str, **settings: Any) -> None:
        """The arguments of ``flora_dist.attach``.

        Raises:
            ValueError: a level that there is not, or a setting that cannot be right.
        """
        self._request = SketchRequest(gradients=gradients, **settings)
        self._request.check()
        self._handle: Handle | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, and clip by Flora's norm from here on.

        Raises:
            ValueError: not exactly one Flora, clipping by value, or what ``flora_dist.attach``
                refuses.
        """
        own_clipping = is_overridden(_HOOK, pl_module)
        if not own_clipping and trainer.gradient_clip_algorithm == "value":
            raise ValueError(
                "sketched gradients can be clipped by their norm alone; gradient_clip_algorithm is "
                "'value'. Pass gradient_clip_algorithm=\"norm\", or none."
            )
        how: dict[str, Any] = self._request.words()
        self._handle = attach(trainer.strategy.model, _flora_of(trainer), **how)
        if not own_clipping:
            setattr(pl_module, _HOOK, _clip)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take off the hooks, which outlive the optimizer, and give the module its clipping."""
        del trainer, stage
        self._undo(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Likewise: Lightning tears nothing down then."""
        del trainer, exception
        self._undo(pl_module)

    def _undo(self, module: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if vars(module).get(_HOOK) is _clip:
            delattr(module, _HOOK)


def _flora_of(trainer: Any) -> Flora:
    found = [unwrapped(each) for each in trainer.optimizers]
    floras = [each for each in found if isinstance(each, Flora)]
    if len(floras) != 1:
        kinds = ", ".join(type(each).__name__ for each in found) or "none"
        raise ValueError(
            "sketched gradients are those of one Flora; configure_optimizers() returned "
            f"{kinds}. Return one flora_dist.Flora."
        )
    return floras[0]


def _clip(
    optimizer: Flora,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
) -> None:
    """In place of ``LightningModule.configure_gradient_clipping``; no value: no clipping."""
    del gradient_clip_algorithm  # refused where it is not the norm
    if gradient_clip_val:
        optimizer.clip_grad_norm_(gradient_clip_val)

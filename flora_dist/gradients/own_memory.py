# SPDX-License-Identifier: Apache-2.0
"""Dense gradients beside sketched ones, in memory of their own.

FSDP2 hands out the gradients of a module's parameters as views of the one buffer that it has
reduced. A norm's few numbers would hold all of it, long after the sketches of the others are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flora_dist.core.layouts.dtensor import local_of
from flora_dist.gradients.flow import Source


class OwnMemory:
    """Copies a model's dense gradients out of buffers that they share, as each arrives."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing is copied until ``install``."""
        self._model = model
        self._handles: list[RemovableHandle] = []

    def install(self, sources: Sequence[Source]) -> None:
        """Begin; ``sources`` are the parameters that are taken anyway."""
        taken = {id(source.tensor) for source in sources}
        parameters: list[Any] = [*self._model.parameters()]
        self._handles += [
            parameter.register_post_accumulate_grad_hook(_copy_out)
            for parameter in parameters
            if parameter.requires_grad and id(parameter) not in taken
        ]

    def restore(self) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@torch.no_grad()
def _copy_out(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None:
        return
    local = local_of(gradient)
    if local.untyped_storage().nbytes() > local.nbytes:
        parameter.grad = gradient.clone()

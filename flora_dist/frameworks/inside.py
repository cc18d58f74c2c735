# SPDX-License-Identifier: Apache-2.0
"""The optimizer inside a host's wrappers."""

from __future__ import annotations

from typing import Any

from flora_dist.flora import Flora


def unwrapped(optimizer: Any) -> Any:
    """The innermost optimizer of accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, Flora) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer

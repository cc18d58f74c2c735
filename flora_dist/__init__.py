# SPDX-License-Identifier: Apache-2.0
"""Flora (arXiv 2402.03293) for sharded training: optimizer states as random projections.

Importing this package loads no torch; the names below load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flora_dist import accelerate as accelerate
    from flora_dist import checkpoint as checkpoint
    from flora_dist import ddp as ddp
    from flora_dist import deepspeed as deepspeed
    from flora_dist import fsdp1 as fsdp1
    from flora_dist import lightning as lightning
    from flora_dist import torchtitan as torchtitan
    from flora_dist import transformers as transformers
    from flora_dist.core.parameters.report import Report
    from flora_dist.flora import Flora
    from flora_dist.flora import by_position as by_position
    from flora_dist.gradients.attach import attach as attach
    from flora_dist.gradients.in_backward import step_in_backward as step_in_backward
    from flora_dist.version import __version__

__all__ = ["Flora", "Report", "__version__", "attach", "by_position", "step_in_backward"]

_HOMES = {
    "Flora": "flora_dist.flora",
    "Report": "flora_dist.core.parameters.report",
    "__version__": "flora_dist.version",
    "attach": "flora_dist.gradients.attach",
    "by_position": "flora_dist.flora",
    "step_in_backward": "flora_dist.gradients.in_backward",
}
# Not in __all__: import * would need DeepSpeed.
_FRAMEWORKS = (
    "accelerate",
    "checkpoint",
    "ddp",
    "deepspeed",
    "fsdp1",
    "lightning",
    "torchtitan",
    "transformers",
)


def __getattr__(name: str) -> Any:
    if name in _FRAMEWORKS:
        return import_module(f"flora_dist.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'flora_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted((*__all__, *_FRAMEWORKS))

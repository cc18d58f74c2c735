# SPDX-License-Identifier: Apache-2.0
"""Flora under DeepSpeed ZeRO: ``initialize`` in place of ``deepspeed.initialize``."""

from flora_dist.frameworks.deepspeed.attach import attach
from flora_dist.frameworks.deepspeed.checkpoint import load_checkpoint, save_checkpoint
from flora_dist.frameworks.deepspeed.engine import initialize
from flora_dist.frameworks.deepspeed.gradients import gradient_report

__all__ = ["attach", "gradient_report", "initialize", "load_checkpoint", "save_checkpoint"]

# SPDX-License-Identifier: Apache-2.0
"""Flora under DeepSpeed ZeRO: ``initialize`` in place of ``deepspeed.initialize``."""

from flora_dist.integrations.deepspeed import attach
from flora_dist.integrations.deepspeed_checkpoint import load_checkpoint, save_checkpoint
from flora_dist.integrations.deepspeed_engine import initialize
from flora_dist.integrations.deepspeed_gradients import gradient_report

__all__ = ["attach", "gradient_report", "initialize", "load_checkpoint", "save_checkpoint"]

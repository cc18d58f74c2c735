# SPDX-License-Identifier: Apache-2.0
"""Flora under DeepSpeed ZeRO: ``initialize`` in place of ``deepspeed.initialize``."""

from flora_dist.integrations.deepspeed import attach
from flora_dist.integrations.deepspeed_engine import initialize
from flora_dist.integrations.deepspeed_gradients import gradient_report

__all__ = ["attach", "gradient_report", "initialize"]

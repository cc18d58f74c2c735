# SPDX-License-Identifier: Apache-2.0
"""Flora under DeepSpeed ZeRO: ``initialize`` in place of ``deepspeed.initialize``."""

from flora_dist.integrations.deepspeed import attach
from flora_dist.integrations.deepspeed_engine import initialize

__all__ = ["attach", "initialize"]

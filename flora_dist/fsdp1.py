# SPDX-License-Identifier: Apache-2.0
"""Flora under FSDP1: call ``attach`` once, after wrapping."""

from flora_dist.integrations.fsdp1 import attach

__all__ = ["attach"]

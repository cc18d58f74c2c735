# SPDX-License-Identifier: Apache-2.0
"""Flora under FSDP1: call ``attach`` once, after wrapping."""

from flora_dist.frameworks.fsdp1 import attach

__all__ = ["attach"]

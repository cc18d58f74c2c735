# SPDX-License-Identifier: Apache-2.0
"""Sketched gradients under DDP for any optimizer: a communication hook and its state."""

from flora_dist.frameworks.ddp_hook import FloraState, flora_hook

__all__ = ["FloraState", "flora_hook"]

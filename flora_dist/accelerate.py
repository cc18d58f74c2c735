# SPDX-License-Identifier: Apache-2.0
"""Sketched gradients in a loop of Accelerate, by one line after ``accelerator.prepare``.

    flora_dist.accelerate.attach(accelerator, model, optimizer, "compressed")

Dense gradients need nothing of this.
"""

from flora_dist.frameworks.accelerate import attach

__all__ = ["attach"]

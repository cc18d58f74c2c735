# SPDX-License-Identifier: Apache-2.0
"""Sketched gradients in Lightning, by one callback.

    Trainer(callbacks=[flora_dist.lightning.SketchedGradients("compressed")])

Dense gradients need nothing of this.
"""

from flora_dist.frameworks.lightning import SketchedGradients

__all__ = ["SketchedGradients"]

# SPDX-License-Identifier: Apache-2.0
"""Flora in torchtitan: ``optimizer=flora_dist.torchtitan.default_flora(lr=1e-3, rank=8)``.

In a config of several groups, ``FloraContainer.Config(param_groups=[...])`` takes the place of
``OptimizersContainer.Config``, and ``optimizer_name="Flora"`` that of ``"AdamW"``.
"""

from flora_dist.frameworks.torchtitan import FloraContainer, default_flora

__all__ = ["FloraContainer", "default_flora"]

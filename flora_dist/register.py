# SPDX-License-Identifier: Apache-2.0
"""Importing this makes ``"type": "Flora"`` known to code that calls DeepSpeed itself.

DeepSpeed looks names of optimizers up in ``torch.optim``. Afterwards call
``flora_dist.deepspeed.attach(engine)``; the first step raises if nobody did. The config needs
``"zero_allow_untested_optimizer": true`` and, with offload,
``"zero_force_ds_cpu_optimizer": false``.
"""

import torch

from flora_dist.flora import Flora

torch.optim.Flora = Flora  # type: ignore[attr-defined]

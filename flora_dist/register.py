# SPDX-License-Identifier: Apache-2.0
"""Importing this makes Flora work in code that calls ``deepspeed.initialize`` itself.

``"type": "Flora"`` is known, and ``deepspeed.initialize`` attaches wherever the optimizer is a
Flora: in Accelerate, the Hugging Face Trainer, Lightning, or your own code. It also sets
``zero_allow_untested_optimizer`` and ``zero_force_ds_cpu_optimizer``, leaves out what ``"auto"``
became for Adam, and refuses engines that would train with another optimizer than the Flora that was
built: DeepSpeedCPUAdam under Accelerate's offload, AdamW where the Trainer drops ``optimizers=``.

Import it before the framework builds the engine. Other optimizers are not touched.
"""

import torch

from flora_dist.flora import Flora
from flora_dist.frameworks.deepspeed.joining import join

torch.optim.Flora = Flora  # type: ignore[attr-defined]
join()

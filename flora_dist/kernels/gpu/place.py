# SPDX-License-Identifier: Apache-2.0
"""Which device launches go to: Triton takes the current one, wherever the tensors lie."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device; in the interpreter there is only one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

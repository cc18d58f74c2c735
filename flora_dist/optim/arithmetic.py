# SPDX-License-Identifier: Apache-2.0
"""Full fp32 products inside a step, whatever the user has set for the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def exact_products(device_types: Iterable[str]) -> Iterator[None]:
    """Switch autocast, TF32 and bf16 products off; restore them after.

    Column sums and sketches are matrix products. Autocast would take them in bf16, and
    ``torch.set_float32_matmul_precision("high")`` in TF32: 1e-3 off, without a word.
    """
    cpu: Any = torch.backends.mkldnn  # torch's stubs do not know its attributes
    backends = (torch.backends.cuda.matmul, cpu.matmul)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        for device_type in sorted(set(device_types)):
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision

# SPDX-License-Identifier: Apache-2.0
"""Peak bytes of the tensors that one `step()` makes, on llama-60m's shapes.

    python -m tests.bench.step_memory

Beside weights, gradients and state, which stay. What a compiled kernel keeps on its own stack and
in its own buffers is no tensor and is not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flora_dist import Flora
from flora_dist.kernels.library import found
from tests.bench.memory import LiveBytes
from tests.bench.step import RULES, SHAPES
from tests.kernels.paths import path

MODEL = "llama-60m, 75 tensors"


def peak_of(rule: str, kernels: str) -> int:
    """Bytes at the peak of the third step."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES[MODEL]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = Flora([(f"p{i}", p) for i, p in enumerate(parameters)], momentum=rule)
    with path(kernels):
        optimizer.step()
        optimizer.step()
        state = [v for own in optimizer.state.values() for v in own.values()]
        tensors = [v for v in state if isinstance(v, Tensor)]
        gradients = [p.grad for p in parameters if p.grad is not None]
        with LiveBytes(known=[*parameters, *gradients, *tensors]) as live:
            optimizer.step()
    return live.peak


def main() -> None:
    """Print a line for each rule and path."""
    for kernels in ["native", "torch"] if found().operators is not None else ["torch"]:
        for rule in RULES:
            print(f"{rule:13} {kernels:7} {peak_of(rule, kernels) / 1e6:8.3f} MB", flush=True)


if __name__ == "__main__":
    main()

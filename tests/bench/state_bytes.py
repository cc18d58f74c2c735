# SPDX-License-Identifier: Apache-2.0
"""Measures the optimizer state of llama-60m at ratio 16, against AdamW's 8 bytes per element.

    python tests/bench/state_bytes.py

Bytes are counted on the state tensors themselves after one step with random gradients; the report's
own number stands beside them. Compressed parameters are all matrices, embedding and head included.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from flora_dist import Flora

CONFIG = Path(__file__).parents[2] / "configs" / "model" / "llama_60m.json"
RANK, BLOCK = 4, 64


def llama_60m() -> nn.Module:
    """The model of the config file, with its vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG))
    return model


def measured(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> int:
    """Bytes of the state tensors of these parameters."""
    tensors = [
        value
        for parameter in parameters
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    """Prints one line per optimizer."""
    model = llama_60m()
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    elements = sum(parameter.numel() for parameter in parameters)
    inside = sum(parameter.numel() for parameter in matrices)
    print(f"llama-60m: {elements:,} parameters, {inside:,} of them in matrices")
    print(f"{'optimizer':34} {'state bytes':>13} {'reported':>13} {'bytes per matrix element':>25}")

    def line(name: str, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        own = f"{optimizer.report().state_bytes:,}" if isinstance(optimizer, Flora) else ""
        ratio = measured(optimizer, matrices) / inside
        print(f"{name:34} {measured(optimizer, parameters):13,} {own:>13} {ratio:25.4f}")

    line("AdamW", torch.optim.AdamW(parameters))
    for state_dtype in ("float32", "bfloat16"):
        name = f"Flora, rank {RANK} of {BLOCK}, {state_dtype}"
        named = model.named_parameters()
        line(name, Flora(named, rank=RANK, block=BLOCK, state_dtype=state_dtype))


if __name__ == "__main__":
    main()

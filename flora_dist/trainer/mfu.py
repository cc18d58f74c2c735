# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs utilization: what part of a device's peak the model's own arithmetic takes.

Of PaLM (arXiv 2204.02311, appendix B): a token costs 6 operations for each weight that multiplies
it, two forward and four backward, and 12 L H Q T for attention, with L layers, H heads of width Q
and sequences of T tokens. Causal masks are not subtracted, activations that are computed again do
not count, and the optimizer does not. Here a weight that stands still costs 4: nobody forms its
gradient.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from flora_dist.trainer.config import Config
from flora_dist.trainer.replicated import World

# Dense bfloat16, from the makers' data sheets, in 10^12 operations a second; the first name that
# a device's name contains.
_KNOWN: Final = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def load_of_a_token(model: nn.Module, network: Any, config: Config, world: World) -> float | None:
    """Seconds in which one device at its peak would train on one token; times tokens/s it is MFU.

    Args:
        model: the whole network, arranged and not yet spread.
        network: its transformers config.
        config: the run's.
        world: the processes.

    Returns:
        None where the peak is not known, or the formula does not hold: for mixtures of experts and
        for networks without attention heads.
    """
    peak, flops = _peak(config, world), flops_per_token(model, network, config.data.sequence_length)
    return None if peak is None or flops is None else flops / peak


def flops_per_token(model: Any, network: Any, length: int) -> int | None:
    """Operations for one token of sequences of that length, forward and backward."""
    heads = getattr(network, "num_attention_heads", None)
    has_experts = any(getattr(network, name, None) for name in _EXPERTS)
    if heads is None or has_experts or any(p.ndim > 2 for p in model.parameters()):
        return None
    width: int = getattr(network, "head_dim", None) or network.hidden_size // heads
    head = getattr(model.get_output_embeddings(), "weight", None)
    # A table is looked up, unless the head multiplies by it.
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    products = sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices)
    layers: int = network.num_hidden_layers
    return int(products + 12 * layers * heads * width * length)


def _peak(config: Config, world: World) -> float | None:
    """Operations a second of one device."""
    said = config.backend.peak_tflops
    if said is None and world.device.type == "cuda" and config.train.precision != "float32":
        name = torch.cuda.get_device_name(world.device)
        said = next((peak for part, peak in _KNOWN.items() if part in name), None)
    return None if said is None else said * 1e12

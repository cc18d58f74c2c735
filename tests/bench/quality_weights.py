# SPDX-License-Identifier: Apache-2.0
"""The table of weights in bfloat16 alone: what they lose without float32 ones beside them.

    python -m tests.bench.quality --table weights --workers 1

"float32" is all in float32, "bfloat16" arithmetic over float32 weights, the rest has weights in
bfloat16 alone, rounded stochastically or to the nearest number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.bench.quality_compressed import MOST_MICRO_BATCHES
from tests.bench.quality_plan import Row, Size
from tests.bench.quality_sceptic import TILES

# One learning rate for all, near the best of both rules with float32 weights
# (results/few_bits.json): what is compared are the weights.
FULL = Size(steps=320, layers=1, evaluations=4, grid=(1,), extensions=0, seeds=3)
QUICK = Size(steps=120, layers=1, evaluations=4, sequences=128, grid=(1,), extensions=0)
# The default, spelled out.
DEFAULT: dict[str, Any] = {"momentum": "blend", "rank": 16, "block": 64, "blend_gain": 1.0}
MIXED = "bfloat16"
ALONE = "bfloat16-pure"
QUICK_ROWS = ("Flora, bfloat16", "Flora, alone", "Flora, alone, to the nearest")


def weights_rows() -> tuple[Row, ...]:
    """Every row of the table, the most telling ones first."""
    nearest = {"stochastic_rounding": False}
    return (
        _flora("Flora, bfloat16", MIXED),
        _flora("Flora, alone", ALONE),
        _flora("Flora, alone, to the nearest", ALONE, nearest),
        _flora("Flora, alone, norms in float32", ALONE, norms="float32"),
        _flora(
            "Flora, alone, gradients 64 x 4 bits",
            ALONE,
            gradient_rank=64,
            gradient_bits=4,
            micro_batches=MOST_MICRO_BATCHES,
        ),
        _flora(
            "Flora, alone, all in few bits",
            ALONE,
            {"state_bits": 4},
            gradient_rank=64,
            gradient_bits=4,
        ),
        _flora(
            "Flora, alone, tiles, gradients 64 x 4 bits",
            ALONE,
            {"momentum": "vectors", **TILES},
            gradient_rank=64,
            gradient_bits=4,
        ),
        _adamw("AdamW, bfloat16", MIXED),
        _adamw("AdamW, alone, to the nearest", ALONE),
        _flora("Flora, float32", "float32"),
        _flora("Flora, alone, none", ALONE, {"momentum": "none"}),
        _flora("Flora, bfloat16, none", MIXED, {"momentum": "none"}),
    )


def _flora(name: str, precision: str, changes: dict[str, Any] | None = None, **more: Any) -> Row:
    return Row(
        name=name,
        factor="weights",
        optimizer="flora",
        options=DEFAULT | (changes or {}),
        precision=precision,
        **more,
    )


def _adamw(name: str, precision: str) -> Row:
    options = {"weight_decay": 0.0, "betas": (0.9, 0.95)}
    return Row(name=name, factor="weights", optimizer="adamw", options=options, precision=precision)


def keep_norms(model: nn.Module, dtype: torch.dtype) -> None:
    """Give modules of nothing but vectors, a llama's norms, weights in another dtype.

    What they return keeps the dtype of what they got.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.ndim == 1 for parameter in own):
            for parameter in own:
                parameter.data = parameter.data.to(dtype)
            module.register_forward_hook(_as_given)


def _as_given(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module
    return output.to(inputs[0].dtype)

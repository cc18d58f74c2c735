# SPDX-License-Identifier: Apache-2.0
"""Ways to train the model: what is trained, and the optimizer state of what a rank holds of it.

    AdamW         two fp32 numbers per element (torch.optim.AdamW): 8 bytes
    8-bit AdamW   two 8-bit codes per element and two fp32 scales per 256 of them; tensors of fewer
                  than 4096 elements as AdamW (Dettmers et al., arXiv 2110.02861; blocks and limit
                  of bitsandbytes and torchao): 2.03 bytes
    GaLore        an n x m matrix of the layers, n <= m: r n of the projector and 2 r m of the
                  moments in fp32 (arXiv 2403.03507, table 1); AdamW for everything else
    LoRA          adapters r (n + m) of every matrix of the layers, with AdamW; the rest is frozen,
                  in the precision of forward (arXiv 2106.09685, section 4)
    Flora         flora_dist/core/state/spec.py, the list that the optimizer allocates from

GaLore reads whole gradients and its code has no version for shards: planned replicated, as ddp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from flora_dist.cluster.planner.model import Parameter
from flora_dist.cluster.planner.request import BACKENDS, DENSE, Backend, Request
from flora_dist.cluster.planner.shares import Share
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry, geometry_of, state_tensors

FP32 = 4
CODES_PER_SCALE = 256
SMALLEST_8BIT = 4096
RATIOS = (4, 8, 16)
"""Block over rank of the Floras that are compared with the one asked for."""
DEFAULT_GALORE_SHARE = 4
"""Hidden size over GaLore's rank, unless given: 1024 for 7B, 512 for 1B, 256 for 350M, 128 for 60M
in the paper (section 5, table 2)."""
DEFAULT_LORA_RANK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to train."""

    label: str
    backend: Backend
    trained: tuple[Parameter, ...]
    frozen: tuple[Parameter, ...] = ()
    state: Callable[[Share], int]
    """Bytes for what a rank holds of a parameter."""
    flora: FloraConfig | None = None
    """None: another optimizer."""
    level: str = DENSE
    sketch: FloraConfig
    """Blocks and numbers of sketched gradients, unless the level is dense."""
    adapter_rank: int = 0
    """Of LoRA."""

    def sketch_of(self, parameter: Parameter) -> Geometry | None:
        """How its gradient is sketched; None: it is not."""
        if self.level == DENSE:
            return None
        geometry = blocks_of(parameter, self.sketch)
        return None if geometry.rank is None else geometry


def asked(request: Request) -> Method:
    """Flora as the request has it."""
    return _flora(request, request.flora, request.gradients, request.gradient_config)


def compared(request: Request) -> Iterator[Method]:
    """The method asked for, Flora at other ratios and levels, and other optimizers."""
    first = asked(request)
    yield first
    seen = {first.label}
    for level in request.backend.levels:
        for config in _ratios(request.flora):
            other = _flora(request, config, level, config)
            if other.label not in seen:
                seen.add(other.label)
                yield other
    yield from others(request)


def others(request: Request) -> Iterator[Method]:
    """AdamW, 8-bit AdamW, GaLore and LoRA."""
    base = Method(
        label="AdamW",
        backend=request.backend,
        trained=request.model.parameters,
        state=adamw_state,
        sketch=request.flora,
    )
    yield base
    yield replace(base, label="AdamW, 8-bit", state=adamw_8bit_state)
    yield replace(
        base,
        label=f"GaLore, rank {request.galore_rank} (ddp)",
        backend=BACKENDS["ddp"],
        state=partial(galore_state, rank=request.galore_rank),
    )
    yield replace(
        base,
        label=f"LoRA, rank {request.lora_rank}",
        trained=tuple(_adapters(request)),
        frozen=request.model.parameters,
        adapter_rank=request.lora_rank,
    )


def blocks_of(parameter: Parameter, config: FloraConfig) -> Geometry:
    """A parameter in blocks, where only block and rank of the settings matter."""
    return _geometry(parameter.shape, config.rank, config.block)


@lru_cache(maxsize=4096)
def _geometry(shape: tuple[int, ...], rank: int | None, block: int | str) -> Geometry:
    return geometry_of("", shape, FloraConfig(rank=rank, block=block))


# ---- state


def flora_state(share: Share, *, config: FloraConfig) -> int:
    """Bytes of the tensors of ``state_tensors`` that a rank keeps for its tiles."""
    geometry = blocks_of(share.parameter, config)
    return sum(
        _numbers(share, entry.along, entry.block, entry.shape, entry.name)
        * (2 if entry.dtype == "bfloat16" else FP32)
        for entry in state_tensors(geometry, config)
    )


def _numbers(share: Share, along: str, block: int, shape: tuple[int, ...], name: str) -> int:
    if along == "elements":
        return share.elements
    if along == "columns":  # of every matrix that is touched, whole
        return (share.tiles[-1].matrices[1] - share.tiles[0].matrices[0]) * shape[-1]
    entries = sum(tile.num_blocks(block) for tile in share.tiles)
    return entries if name == "row" else entries * shape[-1]


def adamw_state(share: Share) -> int:
    """Two fp32 moments."""
    return 2 * FP32 * share.elements


def adamw_8bit_state(share: Share) -> int:
    """Two moments of a byte, and their scales."""
    if share.elements < SMALLEST_8BIT:
        return adamw_state(share)
    return 2 * (share.elements + FP32 * math.ceil(share.elements / CODES_PER_SCALE))


def galore_state(share: Share, *, rank: int) -> int:
    """Projector and low-rank moments of a matrix; AdamW's for the rest."""
    parameter = share.parameter
    if parameter.kind != "matrix" or rank >= min(parameter.shape):
        return adamw_state(share)
    low, high = sorted(parameter.shape)
    return FP32 * (rank * low + 2 * rank * high)


# ---- Flora's variants


def _flora(request: Request, config: FloraConfig, level: str, sketch: FloraConfig) -> Method:
    return Method(
        label=_label(config, level, sketch),
        backend=request.backend,
        trained=request.model.parameters,
        state=partial(flora_state, config=config),
        flora=config,
        level=level,
        sketch=sketch,
    )


def _label(config: FloraConfig, level: str, sketch: FloraConfig) -> str:
    label = f"Flora 1/{_ratio(config)}, {level}"
    is_other = level != DENSE and sketch.rank != config.rank
    return f"{label} 1/{_ratio(sketch)}" if is_other else label


def _ratio(config: FloraConfig) -> str:
    assert isinstance(config.block, int)
    assert config.rank is not None
    return f"{config.block / config.rank:g}"


def _ratios(config: FloraConfig) -> Iterator[FloraConfig]:
    assert isinstance(config.block, int)
    for ratio in RATIOS:
        if config.block // ratio >= 1:
            yield replace(config, rank=config.block // ratio)


def _adapters(request: Request) -> Iterator[Parameter]:
    rank = request.lora_rank
    for parameter in request.model.linears():
        rows, columns = parameter.shape
        for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            yield replace(parameter, name=f"{parameter.name}.{name}", shape=shape)


STATES: Mapping[str, str] = {
    "AdamW": "8 B per element (two fp32 moments)",
    "AdamW, 8-bit": "2.03 B per element (bitsandbytes, torchao; arXiv 2110.02861)",
    "GaLore": "r n + 2 r m numbers of an n x m matrix, n <= m, fp32 (arXiv 2403.03507, table 1); "
    "it has no version for shards: replicated, as ddp",
    "LoRA": "AdamW on r (n + m) numbers of each matrix of the layers, the rest frozen "
    "(arXiv 2106.09685)",
    "Flora": "rank numbers per block, row and column means (flora_dist/core/state/spec.py)",
}
"""Method -> what its state is, for people."""

# SPDX-License-Identifier: Apache-2.0
"""Ways to train the model: what is trained, and the optimizer state of what a rank holds of it.

    AdamW         two fp32 numbers per element (torch.optim.AdamW): 8 bytes
    8-bit AdamW   two 8-bit codes per element and two fp32 scales per 256 of them; tensors of fewer
                  than 4096 elements as AdamW (Dettmers et al., arXiv 2110.02861; blocks and limit
                  of bitsandbytes and torchao): 2.03 bytes
    4-bit AdamW   likewise, two codes of 4 bits and scales per 128 (Li et al., arXiv 2309.01507;
                  torchao's blocks): 1.06 bytes
    Muon          one fp32 momentum of every matrix of the layers, AdamW for everything else
                  (arXiv 2502.16982, section 2)
    GaLore        an n x m matrix of the layers, n <= m: r n of the projector and 2 r m of the
                  moments (arXiv 2403.03507, table 1); AdamW for everything else
    APOLLO        2 r m of the moments, and a seed and a norm; -Mini: r = 1 (arXiv 2412.05270, table
                  1); AdamW for everything else
    LoRA          adapters r (n + m) of every matrix of the layers, with AdamW; the rest is frozen,
                  in the precision of forward (arXiv 2106.09685, section 4)
    Flora         flora_dist/core/state/spec.py, the list that the optimizer allocates from

GaLore and APOLLO as their papers count them: weights, gradients and moments in bfloat16 and nothing
in fp32 beside; they read whole gradients, and their code has no version for shards: planned
replicated, as ddp. "in backward": each weight is stepped when its gradient is there, which is freed
at once; moments in 8 bits. That excludes several micro-batches per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from flora_dist.cluster.planner.model import Parameter
from flora_dist.cluster.planner.request import (
    BACKENDS,
    DENSE,
    PRECISIONS,
    PURE,
    Backend,
    Request,
    Sketch,
)
from flora_dist.cluster.planner.shards import Shard
from flora_dist.core.records import DEFAULT_BITS, FULL_BITS
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry, geometry_at, moments_of, state_tensors

FP32 = 4
BF16 = 2
CODES_PER_SCALE = 256
SMALLEST_8BIT = 4096
CODES_PER_SCALE_4BIT = 128
ALONE = "bf16 alone"
"""Of a method without weights in fp32."""
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
    precision: str
    """Of ``PRECISIONS``."""
    trained: tuple[Parameter, ...]
    frozen: tuple[Parameter, ...] = ()
    state: Callable[[Shard], int]
    """Bytes for what a rank holds of a parameter."""
    flora: FloraConfig | None = None
    """None: another optimizer."""
    level: str = DENSE
    sketch: Sketch
    """Of gradients, unless the level is dense."""
    adapter_rank: int = 0
    """Of LoRA."""
    in_backward: bool = False
    """Steps each parameter when its gradient is there, and frees that."""

    @property
    def element(self) -> int:
        """Bytes of a number in forward and backward."""
        return PRECISIONS[self.precision]

    @property
    def is_pure(self) -> bool:
        """There are no weights but those of forward."""
        return self.precision == PURE

    def sketch_of(self, parameter: Parameter) -> Geometry | None:
        """How its gradient is sketched; None: it is not."""
        if self.level == DENSE:
            return None
        geometry = _sketched(parameter.shape, self.sketch)
        return None if geometry.rank is None else geometry


def asked(request: Request) -> Method:
    """Flora as the request has it."""
    return _flora(request, request.flora, request.gradients, request.sketch, request.precision)


def compared(request: Request) -> Iterator[Method]:
    """The method asked for, Flora at other ratios and levels, and other optimizers."""
    first = asked(request)
    yield first
    seen = {first.label}
    for level, config, sketch in _variants(request):
        for precision in _precisions(request):
            other = _flora(request, config, level, sketch, precision)
            if other.label not in seen:
                seen.add(other.label)
                yield other
    yield from others(request)


def _variants(request: Request) -> Iterator[tuple[str, FloraConfig, Sketch]]:
    """Levels and ratios with all numbers in full, and all numbers of a block in few bits."""
    full = replace(request.sketch, bits=FULL_BITS, wire_bits=FULL_BITS)
    for level in request.backend.levels:
        for config in _ratios(request.flora):
            yield level, config, replace(full, rank=config.rank)
        if level == "compressed":
            few = replace(full, rank="block", bits=DEFAULT_BITS, wire_bits=DEFAULT_BITS)
            yield level, request.flora, few


def _precisions(request: Request) -> Iterator[str]:
    """That of the request, and bfloat16 alone where it could be chosen instead."""
    yield request.precision
    if request.precision == "bfloat16" and request.backend.can_be_pure:
        yield PURE


def others(request: Request) -> Iterator[Method]:
    """AdamW in three widths, Muon, GaLore and APOLLO as published, LoRA."""
    base = Method(
        label="AdamW",
        backend=request.backend,
        precision="bfloat16" if request.precision == PURE else request.precision,
        trained=request.model.parameters,
        state=adamw_state,
        sketch=request.sketch,
    )
    yield base
    yield replace(base, label="AdamW, 8-bit", state=adamw_8bit_state)
    yield replace(base, label="AdamW, 4-bit", state=adamw_4bit_state)
    yield replace(base, label="Muon", state=muon_state)
    yield from _published(request, base)
    yield replace(
        base,
        label=f"LoRA, rank {request.lora_rank}",
        trained=tuple(_adapters(request)),
        frozen=request.model.parameters,
        adapter_rank=request.lora_rank,
    )


def _published(request: Request, base: Method) -> Iterator[Method]:
    rank = request.galore_rank
    alone = replace(base, backend=BACKENDS["ddp"], precision=PURE)
    for label, state in (
        (f"GaLore, rank {rank} (ddp)", partial(galore_state, rank=rank)),
        (f"APOLLO, rank {rank} (ddp)", partial(apollo_state, rank=rank)),
        ("APOLLO-Mini (ddp)", partial(apollo_state, rank=1)),
    ):
        yield replace(alone, label=label, state=state)
    if request.accumulate == 1:
        label = f"GaLore, rank {rank}, 8-bit, in backward (one GPU)"
        state = partial(galore_8bit_state, rank=rank)
        yield replace(alone, label=label, state=state, in_backward=True)


def blocks_of(parameter: Parameter, config: FloraConfig) -> Geometry:
    """A parameter in blocks, where only block and rank of the settings matter."""
    return _geometry(parameter.shape, config.rank, config.block, FULL_BITS, 1)


@lru_cache(maxsize=4096)
def _geometry(
    shape: tuple[int, ...], rank: int | None, block: int | str, bits: int, moments: int
) -> Geometry:
    config = FloraConfig(rank=None, block=block)
    return geometry_at("", shape, config, rank=rank, bits=bits, moments=moments)


@lru_cache(maxsize=4096)
def _sketched(shape: tuple[int, ...], sketch: Sketch) -> Geometry:
    return sketch.geometry(shape)


# ---- state


def flora_state(shard: Shard, *, config: FloraConfig) -> int:
    """Bytes of the tensors of ``state_tensors`` that a rank keeps for its tiles."""
    shape, bits = shard.parameter.shape, config.sketch_bits
    geometry = _geometry(shape, config.rank, config.block, bits, moments_of(config))
    return sum(
        _numbers(shard, entry.along, entry.block, entry.shape, entry.name)
        * {"bfloat16": 2, "uint8": 1}.get(entry.dtype, FP32)
        for entry in state_tensors(geometry, config)
    )


def _numbers(shard: Shard, along: str, block: int, shape: tuple[int, ...], name: str) -> int:
    if along == "elements":
        return shard.elements
    if along == "columns":  # of every matrix that is touched, whole
        return (shard.tiles[-1].matrices[1] - shard.tiles[0].matrices[0]) * shape[-1]
    entries = sum(tile.num_blocks(block) for tile in shard.tiles)
    return entries if name == "row" else entries * shape[-1]


def adamw_state(shard: Shard) -> int:
    """Two fp32 moments."""
    return 2 * FP32 * shard.elements


def adamw_8bit_state(shard: Shard) -> int:
    """Two moments of a byte, and their scales."""
    if shard.elements < SMALLEST_8BIT:
        return adamw_state(shard)
    return 2 * (shard.elements + FP32 * math.ceil(shard.elements / CODES_PER_SCALE))


def adamw_4bit_state(shard: Shard) -> int:
    """Two moments of half a byte, and their scales."""
    if shard.elements < SMALLEST_8BIT:
        return adamw_state(shard)
    scales = math.ceil(shard.elements / CODES_PER_SCALE_4BIT)
    return 2 * (math.ceil(shard.elements / 2) + FP32 * scales)


def muon_state(shard: Shard) -> int:
    """One momentum of a matrix of the layers, experts' among them; AdamW's for the rest."""
    is_matrix = shard.parameter.kind in {"matrix", "experts"}
    return FP32 * shard.elements if is_matrix else adamw_state(shard)


def galore_state(shard: Shard, *, rank: int) -> int:
    """Projector and low-rank moments of a matrix, in bfloat16; AdamW's, likewise, for the rest."""
    sides = _sides(shard.parameter, rank)
    if sides is None:
        return 2 * BF16 * shard.elements
    many, low, high = sides
    return BF16 * many * (rank * low + 2 * rank * high)


def galore_8bit_state(shard: Shard, *, rank: int) -> int:
    """Moments of a byte, of a matrix in low rank; projectors in bfloat16."""
    sides = _sides(shard.parameter, rank)
    if sides is None:
        return adamw_8bit_state(shard)
    many, low, high = sides
    codes = rank * high + FP32 * math.ceil(rank * high / CODES_PER_SCALE)
    return many * (BF16 * rank * low + 2 * codes)


def apollo_state(shard: Shard, *, rank: int) -> int:
    """Low-rank moments of a matrix, a seed and a norm; AdamW's for the rest; in bfloat16."""
    sides = _sides(shard.parameter, rank)
    if sides is None:
        return 2 * BF16 * shard.elements
    many, _, high = sides
    return BF16 * many * (2 * rank * high + 2)


def _sides(parameter: Parameter, rank: int) -> tuple[int, int, int] | None:
    """Matrices, and the shorter and the longer side; None: it is not projected to ``rank``."""
    if parameter.kind not in {"matrix", "experts"} or rank >= min(parameter.shape[-2:]):
        return None
    low, high = sorted(parameter.shape[-2:])
    return math.prod(parameter.shape[:-2]), low, high


# ---- Flora's variants


def _flora(
    request: Request, config: FloraConfig, level: str, sketch: Sketch, precision: str
) -> Method:
    in_backward = request.steps_in_backward(level)
    label = _label(config, level, sketch)
    label += f", {ALONE}" if precision == PURE else ""
    return Method(
        label=f"{label}, in backward" if in_backward else label,
        backend=request.backend,
        precision=precision,
        trained=request.model.parameters,
        state=partial(flora_state, config=config),
        flora=config,
        level=level,
        sketch=sketch,
        in_backward=in_backward,
    )


def _label(config: FloraConfig, level: str, sketch: Sketch) -> str:
    label = f"Flora 1/{_ratio(config.block, config.rank)}, {level}"
    if level == DENSE:
        return label
    if sketch.rank not in ("block", config.rank):
        label = f"{label} 1/{_ratio(sketch.block, sketch.rank)}"
    return label if sketch.bits == FULL_BITS else f"{label}, {sketch.bits} bits"


def _ratio(block: int | str, rank: int | str | None) -> str:
    assert isinstance(block, int)
    assert isinstance(rank, int)
    return f"{block / rank:g}"


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
    "AdamW, 4-bit": "1.06 B per element (torchao; arXiv 2309.01507)",
    "Muon": "4 B per element of the layers' matrices, AdamW for the rest (arXiv 2502.16982)",
    "GaLore": "r n + 2 r m numbers of an n x m matrix, n <= m (arXiv 2403.03507, table 1); APOLLO: "
    "2 r m + 2 (arXiv 2412.05270, table 1); all in bf16 without fp32 weights, as their papers "
    "count; no version for shards: replicated, as ddp",
    "LoRA": "AdamW on r (n + m) numbers of each matrix of the layers, the rest frozen "
    "(arXiv 2106.09685)",
    "Flora": "rank numbers per block, of 8 bits or as --momentum-dtype and --state-bits say, row "
    "and column means (flora_dist/core/state/spec.py)",
}
"""Method -> what its state is, for people."""

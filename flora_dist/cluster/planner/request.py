# SPDX-License-Identifier: Apache-2.0
"""What an estimate is asked about, checked once: model, cluster, batch and Flora's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flora_dist.cluster.planner.activations import MicroBatchShape
from flora_dist.cluster.planner.model import Model
from flora_dist.core.records import FEW_BITS, FULL_BITS, gradient_bits
from flora_dist.core.state.settings import FloraConfig, check_bits, check_rank
from flora_dist.core.state.spec import LEVELS, Geometry, geometry_at

PURE = "bfloat16-pure"
"""The weights themselves are in bfloat16, and there are no others."""
PRECISIONS = {"float32": 4, "bfloat16": 2, PURE: 2}
"""Of forward and backward -> bytes of a number. bfloat16 keeps weights in float32 besides."""
WIRE_DTYPES = {"float32": 4, "bfloat16": 2}
"""Of sketches on the wire -> bytes of a number."""
DEVICES = ("cuda", "cpu")
DENSE = LEVELS[0]

Sharding = Literal["whole", "rows", "line", "each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """How a framework holds a model."""

    name: str
    sharding: Sharding
    """Whole on every rank; FSDP2's chunks of rows; ZeRO's one line in equal parts (1, 2); each
    parameter in equal chunks (3)."""
    stage: int | None = None
    """Of ZeRO; None: torch's own."""
    levels: tuple[str, ...] = LEVELS
    """What of the gradients can be compressed."""

    @property
    def can_be_pure(self) -> bool:
        """DeepSpeed's stage 0 steps whole float32 copies of weights in bfloat16."""
        return self.stage != 0


_UNSHARDED = tuple(level for level in LEVELS if level != "sharded")
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(name="ddp", sharding="whole", levels=_UNSHARDED),
        Backend(name="fsdp2", sharding="rows"),
        Backend(name="hsdp", sharding="rows"),
        Backend(name="zero0", sharding="whole", stage=0, levels=_UNSHARDED),
        Backend(name="zero1", sharding="line", stage=1, levels=_UNSHARDED),
        Backend(name="zero2", sharding="line", stage=2, levels=_UNSHARDED),
        Backend(name="zero3", sharding="each", stage=3, levels=_UNSHARDED),
    )
}
"""Name -> how it holds a model."""


BITS = (FULL_BITS, 16, *FEW_BITS)
"""Of a gradient's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """What of a gradient's block is kept and sent."""

    rank: int | Literal["block"] | None
    block: int | str
    bits: int
    wire_bits: int

    def geometry(self, shape: tuple[int, ...]) -> Geometry:
        """A parameter in blocks."""
        config = FloraConfig(rank=None, block=self.block)
        return geometry_at("", shape, config, rank=self.rank, bits=self.bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question; ``ValueError`` where it makes no sense."""

    model: Model
    nodes: int = 1
    gpus: int = 1
    """Per node; a rank each."""
    backend: Backend
    flora: FloraConfig
    gradients: str = DENSE
    """Level, of ``LEVELS``."""
    gradient_rank: int | None = None
    """Numbers per block of sketched gradients; None: the momentum's, or all in few bits."""
    gradient_bits: int | None = None
    """Of each number; None: as ``flora_dist.attach`` takes it."""
    wire_bits: int | None = None
    """Of each number that travels; None: ``gradient_bits``."""
    wire_dtype: str = "float32"
    micro_batch: int = 1
    """Sequences of a rank's forward."""
    sequence_length: int = 1024
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    precision: str = "float32"
    checkpointing: bool = False
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; None: those of a micro-batch."""
    step_in_backward: bool = False
    """Flora steps each parameter when its gradient is there, and frees that, where it can."""
    device: str = "cuda"
    """Of ``DEVICES``: what pieces a kernel takes, and which collectives copy."""
    cpu_offload: bool = False
    """FSDP2's shards of weights and gradients, and the state, rest in the host's memory."""
    bucket: int = 500_000_000
    """Elements of ZeRO's reduction buffer, ``reduce_bucket_size``, and of what gloo gathers at a
    time, ``allgather_bucket_size``; DeepSpeed's default of both."""
    galore_rank: int = 1
    lora_rank: int = 1

    def __post_init__(self) -> None:
        for option in (
            *("nodes", "gpus", "micro_batch", "sequence_length", "accumulate", "bucket"),
            *("galore_rank", "lora_rank"),
        ):
            check_whole(option, getattr(self, option))
        for option in ("gradient_rank", "loss_chunk"):
            if getattr(self, option) is not None:
                check_whole(option, getattr(self, option))
        _check_choice("gradients", self.gradients, LEVELS)
        for name in ("gradient_bits", "wire_bits"):
            if getattr(self, name) is not None:
                check_bits(name, getattr(self, name), BITS)
        self._check_bits()
        # All numbers of a block are legal in few bits alone.
        check_rank(self.gradient_rank, self.flora.block, self.sketch.bits)
        _check_choice("wire_dtype", self.wire_dtype, tuple(WIRE_DTYPES))
        _check_choice("precision", self.precision, tuple(PRECISIONS))
        _check_choice("device", self.device, DEVICES)
        if self.precision == PURE and not self.backend.can_be_pure:
            raise ValueError(
                f"--precision {PURE} needs a backend that can do without float32 weights; "
                f"--backend {self.backend.name} always keeps copies. Use zero1, zero2, zero3, ddp "
                "or fsdp2."
            )
        if self.gradients not in self.backend.levels:
            raise ValueError(
                f"--gradients {self.gradients} needs gradients that the framework shards; "
                f"--backend {self.backend.name} has {', '.join(self.backend.levels)}. Use "
                "compressed, or fsdp2."
            )
        self._check_loss_chunk()
        self._check_in_backward()
        self._check_offload()
        positions = self.model.sizes.positions
        if self.sequence_length > positions:
            raise ValueError(
                "--sequence-length must be within the model's positions; it is "
                f"{self.sequence_length}, {self.model.name} has {positions}. Lower it."
            )

    @property
    def ranks(self) -> int:
        """Of the cluster."""
        return self.nodes * self.gpus

    @property
    def shards(self) -> int:
        """Ranks that a parameter is cut among, where it is cut: HSDP's are one node's."""
        return self.gpus if self.backend.name == "hsdp" else self.ranks

    @property
    def element(self) -> int:
        """Bytes of a number in forward and backward."""
        return PRECISIONS[self.precision]

    @property
    def batch(self) -> MicroBatchShape:
        """A rank's micro-batch."""
        return MicroBatchShape(
            sequences=self.micro_batch,
            length=self.sequence_length,
            element=self.element,
            checkpointing=self.checkpointing,
            loss_chunk=self.loss_chunk,
        )

    def steps_in_backward(self, level: str) -> bool:
        """Whether Flora does, with gradients of this level: they must be complete there."""
        if not self.step_in_backward:
            return False
        if self.ranks == 1:
            is_complete = level != "fused"
        else:
            is_complete = self.backend.sharding == "rows" and level in {DENSE, "sharded"}
        return is_complete and (level != DENSE or self.accumulate == 1)

    @property
    def sketch(self) -> Sketch:
        """Of gradients."""
        bits = gradient_bits(
            self.gradients,
            rank=self.gradient_rank,
            bits=self.gradient_bits,
            wire_bits=self.wire_bits,
            wire_dtype=self.wire_dtype,
        )
        rank = self.flora.rank if self.gradient_rank is None else self.gradient_rank
        is_whole = bits in FEW_BITS and self.gradient_rank is None
        return Sketch(
            rank="block" if is_whole else rank,
            block=self.flora.block,
            bits=bits,
            wire_bits=bits if self.wire_bits is None else self.wire_bits,
        )

    def _check_loss_chunk(self) -> None:
        is_decoder = self.model.family != "t5" and not self.model.sizes.caps_logits
        if self.loss_chunk is None or (is_decoder and self.gradients != "fused"):
            return
        raise ValueError(
            "--loss-chunk needs a decoder whose logits are what its head gives, and a head whose "
            f"gradient is formed; --model is of {self.model.family}, --gradients {self.gradients}. "
            "Leave it out."
        )

    def _check_in_backward(self) -> None:
        name = self.backend.name
        if not self.step_in_backward:
            return
        if self.backend.stage is None and self.steps_in_backward(self.gradients):
            return
        raise ValueError(
            "--step-in-backward needs gradients that are complete in backward; those of --backend "
            f"{name} on {self.ranks} ranks, --gradients {self.gradients}, --accumulate "
            f"{self.accumulate} are not. Use fsdp2 with dense gradients of one micro-batch or "
            "sharded ones of several, or ddp on one rank, there also with compressed ones."
        )

    def _check_offload(self) -> None:
        if not self.cpu_offload or (self.backend.sharding == "rows" and self.device != "cpu"):
            return
        raise ValueError(
            "--cpu-offload moves FSDP2's shards off a GPU; --backend is "
            f"{self.backend.name}, --device {self.device}. Use --backend fsdp2 or hsdp and "
            "--device cuda, or leave it out."
        )

    def _check_bits(self) -> None:
        kept, sent = self.sketch.bits, self.sketch.wire_bits
        if self.gradients != "compressed" and (kept, sent) != (FULL_BITS, FULL_BITS):
            raise ValueError(
                "--gradient-bits and --wire-bits below 32 need --gradients compressed; it is "
                f"{self.gradients}, with {kept} and {sent} bits. Leave them out, or change it."
            )
        if sent > kept:
            raise ValueError(
                f"--wire-bits must not exceed --gradient-bits; they are {sent} and {kept}. Lower "
                "it, or leave it out."
            )


def check_whole(option: str, value: int) -> None:
    """Refuse a number below 1.

    Raises:
        ValueError: naming the option.
    """
    if value < 1:
        raise ValueError(
            f"--{option.replace('_', '-')} must be a whole number of at least 1; got {value}. "
            "Pass 1 or more."
        )


def check_positive(option: str, value: float) -> None:
    """Refuse zero, negative numbers, infinity and NaN.

    Raises:
        ValueError: naming the option.
    """
    if not 0.0 < value < float("inf"):
        raise ValueError(
            f"--{option} must be a number above 0; got {value:g}. Pass a finite number above 0."
        )


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"--{option.replace('_', '-')} must be one of {', '.join(choices)}; got {value!r}. "
            "Pass one of these."
        )

# SPDX-License-Identifier: Apache-2.0
"""What a run is: the sections of a config file as frozen values, each checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from flora_dist.trainer.optional_imports import needs_train_extra

with needs_train_extra():
    from pydantic import (
        AfterValidator,
        ConfigDict,
        Field,
        StrictBool,
        StrictFloat,
        StrictInt,
        StrictStr,
        ValidationInfo,
    )
    from pydantic.dataclasses import dataclass

STDLIB = "python-stdlib"
BYTE = "byte"
DENSE: Final = "dense"
AUTO: Final = "auto"
PURE: Final = "bfloat16-pure"

_KNOWN = ConfigDict(extra="forbid", allow_inf_nan=False)
_Positive = Annotated[StrictInt, Field(ge=1)]


def _found(key: str, reserved: str | None = None) -> AfterValidator:
    """Finds a path of a file's config: from the working directory, else from the file's folder."""

    def find(value: str, info: ValidationInfo) -> str:
        folder: Path | None = info.context  # None where there is no file
        if folder is None or value == reserved:
            return value
        for candidate in (Path(value), folder / value):
            if candidate.exists():
                return str(candidate)
        also = f" (the one built in is {reserved!r})" if reserved else ""
        raise ValueError(
            f"{key} must name something that exists; {value!r} does not, neither from the working "
            f"directory nor from {str(folder)!r}. Correct the path{also}."
        )

    return AfterValidator(find)


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class ModelConfig:
    """Which network is trained. The vocabulary is always the tokenizer's."""

    config: Annotated[StrictStr, _found("model.config")] | None = None
    """A transformers config (.json); its weights are drawn from `train.seed`."""
    pretrained: Annotated[StrictStr, _found("model.pretrained")] | None = None
    """A local folder written by `save_pretrained`; its weights are the starting point."""

    def __post_init__(self) -> None:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError(
                "model needs exactly one of config and pretrained; "
                f"config={self.config!r}, pretrained={self.pretrained!r}. Remove one or set one."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class DataConfig:
    """Which text is read, and how it is cut into sequences."""

    corpus: Annotated[StrictStr, _found("data.corpus", STDLIB)] = STDLIB
    """`python-stdlib` (the standard library's own sources), a file, or a folder of files."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """`auto` goes by the file's ending: .jsonl/.json, .parquet, everything else is text."""
    field: StrictStr = "text"
    """The column of jsonl and parquet files that holds the document."""
    tokenizer: Annotated[StrictStr, _found("data.tokenizer", BYTE)] = BYTE
    """`byte` (256 bytes and one end-of-document token) or a local Hugging Face folder."""
    sequence_length: _Positive = 256
    """Tokens per sequence."""
    validation_every: Annotated[StrictInt, Field(ge=2)] = 20
    """Every so many documents, one goes to validation and never to training."""


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class OptimizerConfig:
    """An optimizer by name; every other key goes to it as it stands."""

    name: Literal["flora", "adamw", "adafactor"]
    """`flora` is `flora_dist.Flora`, the others are `torch.optim`'s."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The keyword arguments, as the optimizer itself names them; `lr` is required."""

    def __post_init__(self) -> None:
        lr = self.options.get("lr")
        if isinstance(lr, bool) or not isinstance(lr, int | float):
            raise ValueError(  # noqa: TRY004 - the user's mistake: one type for all config errors
                f"{self.name} needs a learning rate that is a number; lr={lr!r}. "
                "Set lr, for example lr: 1e-3."
            )
        if not 0.0 <= lr < float("inf"):  # also NaN
            raise ValueError(
                f"a learning rate must be finite and at least 0; {self.name} has lr={lr!r}. "
                "Correct lr."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class GradientsConfig:
    """How Flora's gradients are kept between backward and step, as `flora_dist.attach` says it."""

    level: Literal["dense", "sharded", "compressed", "fused"] = DENSE
    """`sharded`: reduced whole, kept as sketches; `compressed`: kept and reduced as sketches;
    `fused`: linear layers compute the sketch and never the gradient. `compare` stays dense."""
    rank: _Positive | None = None
    """Numbers per block of the sketches; None: the optimizer's `rank`, or all below 16 bits."""
    bits: Literal[32, 16, 8, 4, 2, 1] | None = None
    """Of each number that is kept; None: 32."""
    wire_bits: Literal[32, 16, 8, 4, 2, 1] | None = None
    """Of each number that travels; None: `bits`."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """What travels of the sketches."""

    def __post_init__(self) -> None:
        bits = self.bits, self.wire_bits
        asks = self.rank is not None or self.wire_dtype != "float32" or bits != (None, None)
        if self.level == DENSE and asks:
            raise ValueError(
                "gradients.rank, bits, wire_bits and gradients.wire_dtype describe sketches, and "
                f"gradients.level='dense' keeps none; they are {self.rank!r}, {self.bits!r}, "
                f"{self.wire_bits!r} and {self.wire_dtype!r}. Remove them, or set level: "
                "compressed."
            )
        if self.level == "sharded" and self.wire_dtype != "float32":
            raise ValueError(
                "under gradients.level='sharded' no sketch travels, the backend reduces whole "
                f"gradients; gradients.wire_dtype={self.wire_dtype!r}. Remove it, or set level: "
                "compressed."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class ScheduleConfig:
    """How the learning rate moves: linear warm-up, then the named curve."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    """The curve after warm-up, down to `final_ratio` at the last step."""
    warmup_steps: Annotated[StrictInt, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    final_ratio: StrictFloat = 0.1
    """Learning rate of the last step, as a part of `lr`; unused by `constant`."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.final_ratio <= 1.0:
            raise ValueError(
                f"schedule.final_ratio must be between 0 and 1; it is {self.final_ratio!r}. "
                "Give the part of lr that is left at the end."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class TrainConfig:
    """How long and in which batches."""

    steps: _Positive
    """Optimizer steps."""
    global_batch: _Positive
    """Sequences per optimizer step, over all processes; the same for every world size."""
    micro_batch: _Positive
    """Sequences one process sends through the model at once; the rest is accumulated."""
    seed: StrictInt = 0
    """The run's one seed: weights, order of the data, dropout, and Flora's projections."""
    precision: Literal["float32", "bfloat16", "bfloat16-pure"] = "float32"
    """`bfloat16`: arithmetic of the model only; weights and reductions stay float32.

    Under deepspeed its "bf16": weights in bfloat16 with float32 masters, reduced as the JSON says.
    `bfloat16-pure`: the weights themselves are in bfloat16, everywhere, and there are no others.
    Flora rounds them stochastically; AdamW and Adafactor, to the nearest, lose small updates.
    """
    max_grad_norm: StrictFloat | None = None
    """Clip the gradient's global norm to this before the step; none by default."""
    log_every: _Positive = 10
    """Steps between two lines of metrics."""
    stop_at_nan: StrictBool = True
    """End the run with exit code 1 where a loss, a weight or a state is NaN or infinite. False: go
    on. Either way no checkpoint of such weights is written."""

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            raise ValueError(
                f"train.max_grad_norm must be above 0; it is {self.max_grad_norm!r}. "
                "Raise it, or set it to null for no clipping."
            )
        if self.global_batch % self.micro_batch:
            raise ValueError(
                "train.global_batch must be a multiple of train.micro_batch; "
                f"global_batch={self.global_batch}, micro_batch={self.micro_batch}. Change one."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class EvaluationConfig:
    """When the validation loss is taken, and on how much."""

    every: _Positive = 100
    """Steps between evaluations; the last step is always evaluated."""
    sequences: _Positive = 64
    """Validation sequences, evenly spread over the held-out documents, always the same."""


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class BackendConfig:
    """How the model is spread over the processes."""

    name: Literal["none", "ddp", "fsdp1", "fsdp2", "hsdp", "deepspeed"] = "none"
    """`none` is one process; `hsdp` is FSDP2 on a replicate x shard mesh."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA with nccl where there is one, else CPU with gloo."""
    replicate: StrictInt | None = None
    """hsdp: number of groups that hold a whole copy of the model."""
    shard: StrictInt | None = None
    """hsdp: number of processes one copy is cut into."""
    reshard_after_forward: StrictBool = True
    """fsdp1, fsdp2, hsdp: free a layer's full weights between forward and backward."""
    config: Annotated[StrictStr, _found("backend.config")] | None = None
    """deepspeed: its JSON config."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """deepspeed: laid over the JSON key by key; null takes a key out."""
    timeout_minutes: StrictFloat | None = None
    """How long a process waits for the others in any message; then the run fails. None: what
    `flora-dist launch --timeout` says, else 10."""

    def __post_init__(self) -> None:
        if self.timeout_minutes is not None and not self.timeout_minutes > 0.0:
            raise ValueError(
                "backend.timeout_minutes must be above 0; it is "
                f"{self.timeout_minutes!r}. Give the minutes that a slow process may need."
            )
        if self.name != "deepspeed" and (self.config is not None or self.changes):
            raise ValueError(
                "backend.config and backend.changes belong to deepspeed; "
                f"backend.name={self.name!r} has {self.config!r} and {dict(self.changes)!r}. "
                "Remove them, or set name: deepspeed."
            )
        if self.name == "deepspeed" and self.config is None:
            raise ValueError(
                "deepspeed needs backend.config, the path of its JSON config; it has none. "
                "See configs/deepspeed."
            )
        sizes = (self.replicate, self.shard)
        if self.name != "hsdp" and sizes != (None, None):
            raise ValueError(
                "backend.replicate and backend.shard belong to hsdp; "
                f"backend.name={self.name!r} has {sizes}. Remove them, or set name: hsdp."
            )
        if self.name == "hsdp" and not all(size is not None and size >= 1 for size in sizes):
            raise ValueError(
                "hsdp needs backend.replicate and backend.shard, both at least 1; "
                f"they are {sizes}. Their product is the number of processes."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class CheckpointConfig:
    """Saving and resuming."""

    every: _Positive | None = None
    """Steps between checkpoints in `<run>/checkpoints`, the last step too; none by default."""
    keep: _Positive | None = 2
    """Newest checkpoints that stay; `auto` takes the one before a damaged one. null: all."""
    asynchronous: StrictBool = False
    """Copy the state at once and write it while training goes on; not under deepspeed."""
    resume: Annotated[StrictStr, _found("checkpoint.resume", AUTO)] | None = None
    """`auto`: go on from the run folder's newest checkpoint, or start where it has none, so that
    the same command starts and resumes. Where the newest is damaged, from the whole one before it,
    with a warning that names both. It removes nothing: a folder with checkpoints is gone on
    with whatever output.overwrite says, which then only allows a run that finished without saving
    to be started over. Else a checkpoint, or the folder of several: the newest."""

    def __post_init__(self) -> None:
        if self.resume == AUTO and self.every is None:
            raise ValueError(
                "checkpoint.resume='auto' goes on from what checkpoint.every saves; "
                "checkpoint.every is null. Set checkpoint.every to a number of steps."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class OutputConfig:
    """Where the results go."""

    folder: StrictStr = "runs"
    """Parent of all run folders."""
    name: StrictStr
    """Name of this run's folder."""
    overwrite: StrictBool = False
    """Replace a run of this name instead of refusing; with checkpoint.resume: auto, see there."""
    tensorboard: StrictBool = True
    """Write TensorBoard scalars beside metrics.jsonl."""
    progress: StrictBool = True
    """Show a progress bar on process 0."""

    def __post_init__(self) -> None:
        if not self.name or self.name in {".", ".."} or set(self.name) & set("/\\"):
            raise ValueError(
                f"output.name must be the plain name of a folder; it is {self.name!r}. "
                "Use output.folder for the path."
            )


@dataclass(frozen=True, kw_only=True, config=_KNOWN)
class Config:
    """One run. The sections of a config file, under their own names."""

    model: ModelConfig
    """The network."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The text."""
    optimizer: OptimizerConfig
    """The optimizer under test."""
    compare: OptimizerConfig | None = None
    """AdamW to be run afterwards on the same data, steps and seed; none by default."""
    gradients: GradientsConfig = dataclasses.field(default_factory=GradientsConfig)
    """What of the gradients of the optimizer under test is compressed; nothing by default."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    """The learning rate's curve."""
    train: TrainConfig
    """Length and batches."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """The validation loss."""
    backend: BackendConfig = dataclasses.field(default_factory=BackendConfig)
    """Processes."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Save and resume."""
    output: OutputConfig
    """Results."""

    def __post_init__(self) -> None:
        if self.compare is not None and self.compare.name != "adamw":
            raise ValueError(
                f"compare runs AdamW; compare.name is {self.compare.name!r}. "
                "Set compare.name: adamw, or compare: null."
            )
        if self.schedule.warmup_steps >= self.train.steps and self.schedule.warmup_steps > 0:
            raise ValueError(
                "schedule.warmup_steps must be below train.steps; "
                f"{self.schedule.warmup_steps} of {self.train.steps}. Lower it or train longer."
            )

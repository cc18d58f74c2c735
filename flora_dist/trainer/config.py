# SPDX-License-Identifier: Apache-2.0
"""What a run is: the sections of a config file as frozen values, each checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from flora_dist.trainer.config_data import KNOWN, DataConfig, ModelConfig, Positive, found
from flora_dist.trainer.optional_imports import needs_train_extra

with needs_train_extra():
    from pydantic import (
        Field,
        StrictBool,
        StrictFloat,
        StrictInt,
        StrictStr,
    )
    from pydantic.dataclasses import dataclass

DENSE: Final = "dense"
AUTO: Final = "auto"
PURE: Final = "bfloat16-pure"


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class OptimizerConfig:
    """An optimizer by name; every other key goes to it as it stands."""

    name: Literal["flora", "adamw", "adafactor"]
    """`flora` is `flora_dist.Flora`, the others are `torch.optim`'s."""
    decay: Literal["matrices", "all"] = "matrices"
    """What `weight_decay` shrinks: `matrices` leaves out norms, biases and other vectors."""
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


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class GradientsConfig:
    """How Flora's gradients are kept between backward and step, as `flora_dist.attach` says it."""

    level: Literal["dense", "sharded", "compressed", "fused"] = DENSE
    """`sharded`: reduced whole, kept as sketches; `compressed`: kept and reduced as sketches;
    `fused`: linear layers compute the sketch and never the gradient. `compare` stays dense."""
    rank: Positive | None = None
    """Numbers per block of the sketches; None: the optimizer's `rank`, or all below 16 bits."""
    bits: Literal[32, 16, 8, 4, 2, 1] | None = None
    """Of each number that is kept; None: 32, or 4 under `compressed` where no more is said."""
    wire_bits: Literal[32, 16, 8, 4, 2, 1] | None = None
    """Of each number that travels; None: `bits`."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """What travels of the sketches."""
    bucket_cap_mb: StrictFloat | None = None
    """MiB of a message that is sent during the last backward; None: one message at the step."""

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
        if self.level == DENSE and self.bucket_cap_mb is not None:
            raise ValueError(
                "gradients.bucket_cap_mb cuts sketches into messages, and gradients.level='dense' "
                f"keeps none; it is {self.bucket_cap_mb!r}. Remove it, or set level: compressed."
            )
        if self.level == "sharded" and self.wire_dtype != "float32":
            raise ValueError(
                "under gradients.level='sharded' no sketch travels, the backend reduces whole "
                f"gradients; gradients.wire_dtype={self.wire_dtype!r}. Remove it, or set level: "
                "compressed."
            )


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class ScheduleConfig:
    """How the learning rate moves: linear warm-up, then the named curve."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """The curve after warm-up, down to `final_ratio` at the last step; `wsd` (warm-up, stable,
    decay) stays at lr and falls in the last `decay_steps` alone."""
    warmup_steps: Annotated[StrictInt, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    final_ratio: StrictFloat = 0.1
    """Learning rate of the last step, as a part of `lr`; unused by `constant`."""
    decay_steps: Positive | None = None
    """wsd: steps of the linear fall at the end; None: a tenth of all steps."""

    def __post_init__(self) -> None:
        if self.decay_steps is not None and self.name != "wsd":
            raise ValueError(
                "schedule.decay_steps belongs to wsd; schedule.name="
                f"{self.name!r} has {self.decay_steps}. Remove it, or set name: wsd."
            )
        if not 0.0 <= self.final_ratio <= 1.0:
            raise ValueError(
                f"schedule.final_ratio must be between 0 and 1; it is {self.final_ratio!r}. "
                "Give the part of lr that is left at the end."
            )


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class TrainConfig:
    """How long and in which batches."""

    steps: Positive
    """Optimizer steps."""
    global_batch: Positive
    """Sequences per optimizer step, over all processes; the same for every world size."""
    micro_batch: Positive
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
    step_in_backward: StrictBool = False
    """Step each parameter as soon as its gradient is complete, and free that: one layer's gradients
    at a time. Flora on none, fsdp2 and hsdp; without max_grad_norm; several micro-batches with
    sketched gradients alone."""
    log_every: Positive = 10
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


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class EvaluationConfig:
    """When the validation loss is taken, and on how much."""

    every: Positive = 100
    """Steps between evaluations; the last step is always evaluated."""
    sequences: Positive = 64
    """Validation sequences, evenly spread over the held-out documents, always the same."""


@dataclass(frozen=True, kw_only=True, config=KNOWN)
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
    cpu_offload: StrictBool = False
    """fsdp2, hsdp: weights, gradients and optimizer state rest in the CPU's memory, where Flora
    steps; a layer's weights come to the device when it is computed. On CPUs nothing moves."""
    config: Annotated[StrictStr, found("backend.config")] | None = None
    """deepspeed: its JSON config."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """deepspeed: laid over the JSON key by key; null takes a key out."""
    timeout_minutes: StrictFloat | None = None
    """How long a process waits for the others in any message; then the run fails. None: what
    `flora-dist launch --timeout` says, else 10."""
    peak_tflops: StrictFloat | None = None
    """What one device can do at most in `train.precision`, in 10^12 operations a second: metrics
    then have `mfu`. None: known for some GPUs in bfloat16, else `mfu` is left out."""

    def __post_init__(self) -> None:
        if self.timeout_minutes is not None and not self.timeout_minutes > 0.0:
            raise ValueError(
                "backend.timeout_minutes must be above 0; it is "
                f"{self.timeout_minutes!r}. Give the minutes that a slow process may need."
            )
        if self.peak_tflops is not None and not self.peak_tflops > 0.0:
            raise ValueError(
                f"backend.peak_tflops must be above 0; it is {self.peak_tflops!r}. Give what the "
                "device's maker says, or null."
            )
        if self.name != "deepspeed" and (self.config is not None or self.changes):
            raise ValueError(
                "backend.config and backend.changes belong to deepspeed; "
                f"backend.name={self.name!r} has {self.config!r} and {dict(self.changes)!r}. "
                "Remove them, or set name: deepspeed."
            )
        if self.cpu_offload and self.name not in {"fsdp2", "hsdp"}:
            raise ValueError(
                "backend.cpu_offload belongs to fsdp2 and hsdp, whose shards can rest in the CPU's "
                f"memory; backend.name={self.name!r}. Set it to false, or set name: fsdp2; "
                "deepspeed has offload_optimizer in its JSON."
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


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class CheckpointConfig:
    """Saving and resuming."""

    every: Positive | None = None
    """Steps between checkpoints in `<run>/checkpoints`, the last step too; none by default."""
    keep: Positive | None = 2
    """Newest checkpoints that stay; `auto` takes the one before a damaged one. null: all."""
    asynchronous: StrictBool = False
    """Copy the state at once and write it while training goes on; not under deepspeed."""
    resume: Annotated[StrictStr, found("checkpoint.resume", AUTO)] | None = None
    """`auto`: go on from the run folder's newest checkpoint, or start where it has none, so that
    the same command starts and resumes. Where the newest is damaged, from the whole one before it,
    with a warning that names both. It removes nothing: a folder with checkpoints is gone on
    with whatever output.overwrite says, which then only allows a run that finished without saving
    to be started over. Else a checkpoint, or the folder of several: the newest."""

    change_lr: StrictBool = False
    """Go on with the config's lr where it differs from the saved one, which is refused else."""

    def __post_init__(self) -> None:
        if self.resume == AUTO and self.every is None:
            raise ValueError(
                "checkpoint.resume='auto' goes on from what checkpoint.every saves; "
                "checkpoint.every is null. Set checkpoint.every to a number of steps."
            )


@dataclass(frozen=True, kw_only=True, config=KNOWN)
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
    tracker: StrictStr | None = None
    """Another that gets them: wandb, or one that a package offers as `flora_dist.trackers`."""
    progress: StrictBool = True
    """Show a progress bar on process 0."""

    def __post_init__(self) -> None:
        if not self.name or self.name in {".", ".."} or set(self.name) & set("/\\"):
            raise ValueError(
                f"output.name must be the plain name of a folder; it is {self.name!r}. "
                "Use output.folder for the path."
            )


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class Config:
    """One run. The sections of a config file, under their own names."""

    model: ModelConfig
    """The network."""
    data: DataConfig
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
        if self.model.loss_chunk is not None and self.gradients.level == "fused":
            raise ValueError(
                "model.loss_chunk computes the head's gradient and gradients.level='fused' never "
                f"forms it; model.loss_chunk={self.model.loss_chunk}. Set it to null, or level: "
                "compressed."
            )
        if self.compare is not None and self.compare.name != "adamw":
            raise ValueError(
                f"compare runs AdamW; compare.name is {self.compare.name!r}. "
                "Set compare.name: adamw, or compare: null."
            )
        moving = self.schedule.warmup_steps + (self.schedule.decay_steps or 0)
        if self.schedule.decay_steps is not None and moving > self.train.steps:
            raise ValueError(
                "schedule.warmup_steps and schedule.decay_steps must fit into train.steps; they "
                f"are {moving} of {self.train.steps}. Lower one or train longer."
            )
        if self.schedule.warmup_steps >= self.train.steps and self.schedule.warmup_steps > 0:
            raise ValueError(
                "schedule.warmup_steps must be below train.steps; "
                f"{self.schedule.warmup_steps} of {self.train.steps}. Lower it or train longer."
            )

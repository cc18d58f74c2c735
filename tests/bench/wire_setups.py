# SPDX-License-Identifier: Apache-2.0
"""Training runs whose traffic and memory are measured: a model, a layout, a level."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import flora_dist
from flora_dist import Flora
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry, geometry_of

MODELS = Path(__file__).parents[2] / "configs" / "model"
BLOCK = 64
LEARNING_RATE = 1e-3


# ---- models


class Model(Protocol):
    """Returns its loss; knows what FSDP2 should shard apart, and what to feed it with."""

    def units(self) -> list[nn.Module]: ...

    def sample(self, generator: torch.Generator) -> Tensor: ...


class Llama(nn.Module):
    """A network of configs/model, on one short sequence."""

    def __init__(self, name: str, *, tokens: int, **changes: int) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        super().__init__()
        settings = json.loads((MODELS / f"{name}.json").read_text()) | changes
        self.network = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
        self.tokens = tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(input_ids=tokens, labels=tokens, use_cache=False).loss

    def units(self) -> list[nn.Module]:
        inner = self.network.model
        return [inner.embed_tokens, *inner.layers, self.network.lm_head]

    def sample(self, generator: torch.Generator) -> Tensor:
        words = self.network.config.vocab_size
        return torch.randint(words, (1, self.tokens), generator=generator)


class Stack(nn.Module):
    """Equal layers of two matrices, biases and a norm; nothing to import, nothing large."""

    def __init__(self, *, layers: int, width: int, inner: int, samples: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width))
            for _ in range(layers)
        )
        self.samples, self.width = samples, width

    def forward(self, x_NI: Tensor) -> Tensor:
        for layer in self.layers:
            x_NI = x_NI + layer(x_NI).tanh()
        return x_NI.square().mean()

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def sample(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.samples, self.width, generator=generator)


def build(kind: str, **settings: Any) -> Any:
    """``kind``: "stack", or a file of configs/model."""
    torch.manual_seed(0)
    return Stack(**settings) if kind == "stack" else Llama(kind, **settings)


# ---- setups


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One row of a table."""

    layout: str
    """A key of ``LAYOUTS``."""
    model: tuple[str, tuple[tuple[str, int], ...]]
    """Arguments of ``build``."""
    ratio: int | None = None
    """Of compressed gradients; None: dense."""
    wire_dtype: str = "float32"
    bits: int | None = None
    """Of each number of a block that is kept and sent, in place of ``ratio``; None: 32."""
    wire_bits: int | None = None
    """Of what is sent; None: as it is kept."""
    bucket_cap_mb: float | None = None
    """Of a message that is sent during backward; None: all is sent at the step."""
    micro_batches: int = 1
    block: int = BLOCK

    @property
    def level(self) -> str:
        return "dense" if self.ratio is self.bits is None else "compressed"

    @property
    def sketches(self) -> dict[str, Any]:
        """Settings of sketched gradients."""
        few: dict[str, Any] = {} if self.wire_bits is None else {"wire_bits": self.wire_bits}
        if self.bucket_cap_mb is not None:
            few["bucket_cap_mb"] = self.bucket_cap_mb
        return {"gradient_bits": self.bits or 32, "wire_dtype": self.wire_dtype, **few}

    @property
    def flora(self) -> dict[str, Any]:
        """Settings of the optimizer; dense rows keep their momentum as the others do."""
        rank = self.block // (self.ratio or 16)
        return {"lr": LEARNING_RATE, "rank": rank, "block": self.block}

    def build(self) -> Any:
        kind, settings = self.model
        return build(kind, **dict(settings))

    def geometries(self) -> list[Geometry]:
        """Of the gradients, by the model's shapes alone."""
        settings = {name: value for name, value in self.flora.items() if name != "lr"}
        config = FloraConfig(**settings)
        with torch.device("meta"):
            named = list(self.build().named_parameters())
        return [geometry_of(name, tuple(p.shape), config) for name, p in named]

    def __str__(self) -> str:
        if self.bits is not None:
            sent = "" if self.wire_bits is None else f", sent in {self.wire_bits}"
            cut = "" if self.bucket_cap_mb is None else f", {self.bucket_cap_mb:g} MiB"
            return f"{self.layout}, {self.bits} bits{sent}{cut}"
        if self.ratio is None:
            return f"{self.layout}, dense"
        return f"{self.layout}, 1/{self.ratio} {self.wire_dtype}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a run goes on; every rank calls the same."""

    model: Any
    """As it was built, not wrapped."""
    micro_batches: int
    """Of a step."""
    forward: Callable[[Tensor, bool], Tensor]
    """The loss of a micro-batch; whether it is the last of its step."""
    backward: Callable[[Tensor, bool], None]
    reduce: Callable[[], None]
    """Average sketches over the ranks now; else the step does."""
    step: Callable[[], None]

    def accumulate(
        self, step: int, around_backward: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """All micro-batches of a step; ``around_backward`` makes what each backward runs in."""
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        for number in range(1, self.micro_batches + 1):
            is_last = number == self.micro_batches
            loss = self.forward(self.model.sample(generator), is_last)
            with around_backward():
                self.backward(loss, is_last)

    def run(self, steps: range) -> None:
        """Whole steps."""
        for step in steps:
            self.accumulate(step)
            self.step()


def start(setup: Setup) -> Training:
    """A run at its beginning."""
    return LAYOUTS[setup.layout](setup)


# ---- torch's own layouts


def _ddp(setup: Setup) -> Training:
    # Rotary tables are buffers; without this DDP would send them before each forward.
    model = setup.build()
    return _plain_loop(model, DistributedDataParallel(model, broadcast_buffers=False), setup)


def _ddp_powersgd(setup: Setup) -> Training:
    """torch's PowerSGD at the compression that ``ratio`` names, with its defaults otherwise.

    In one bucket: its callbacks start further all-reduces from threads of gloo, so with several
    buckets their order differs between ranks and the processes abort (torch 2.13.0).
    """
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

    assert setup.ratio is not None
    model = setup.build()
    megabytes = 1 + sum(p.numel() * p.itemsize for p in model.parameters()) // 2**20
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, bucket_cap_mb=megabytes)
    state = powersgd.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=_powersgd_rank(model, setup.ratio),
        start_powerSGD_iter=2,  # the smallest that its error feedback allows
    )
    wrapped.register_comm_hook(state, powersgd.powerSGD_hook)
    return _plain_loop(model, wrapped, setup, compress=False)


def _powersgd_rank(model: nn.Module, ratio: int) -> int:
    """The rank at which its two factors of all matrices are 1 / ratio of them, or just above."""
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    whole = sum(rows * columns for rows, columns in shapes)
    return max(1, round(whole / ratio / sum(rows + columns for rows, columns in shapes)))


def _ddp_hook(setup: Setup) -> Training:
    """flora_dist's own hook, before an optimizer with dense gradients."""
    from flora_dist.ddp import FloraState, flora_hook

    model = setup.build()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    state = FloraState(
        model.named_parameters(),
        rank=setup.flora["rank"],
        block=setup.block,
        wire_dtype=setup.wire_dtype,
    )
    wrapped.register_comm_hook(state, flora_hook)
    return _plain_loop(model, wrapped, setup, compress=False)


def _fsdp2(setup: Setup) -> Training:
    return _sharded(setup, init_device_mesh("cpu", (dist.get_world_size(),)))


def _fsdp2_kept(setup: Setup) -> Training:
    """Weights stay gathered from forward to backward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return _sharded(setup, mesh, reshard_after_forward=False)


def _hsdp(setup: Setup) -> Training:
    names = ("replicate", "shard")
    return _sharded(setup, init_device_mesh("cpu", (2, 2), mesh_dim_names=names))


def _sharded(setup: Setup, mesh: Any, **options: Any) -> Training:
    model = setup.build()
    for unit in (*model.units(), model):
        fully_shard(unit, mesh=mesh, **options)
    return _plain_loop(model, model, setup)


def _plain_loop(
    model: nn.Module, wrapped: nn.Module, setup: Setup, *, compress: bool = True
) -> Training:
    """What a user of torch writes; only the last micro-batch of a step is synchronised."""
    optimizer = Flora(wrapped.named_parameters(), **setup.flora)
    reduce = _nothing
    if setup.level != "dense" and compress:
        handle = flora_dist.attach(wrapped, optimizer, setup.level, **setup.sketches)
        reduce = handle.gradients.reduce

    def forward(sample: Tensor, is_last: bool) -> Tensor:
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(is_last)
        elif isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = is_last  # what no_sync() does
        return wrapped(sample) / setup.micro_batches

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Training(
        model=model,
        micro_batches=setup.micro_batches,
        forward=forward,
        backward=lambda loss, _: loss.backward(),
        reduce=reduce,
        step=step,
    )


# ---- DeepSpeed's


def _zero(stage: int) -> Callable[[Setup], Training]:
    return lambda setup: _engine(setup, stage)


def _engine(setup: Setup, stage: int) -> Training:
    import flora_dist.deepspeed

    model = setup.build()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setup.micro_batches,
        "optimizer": {"type": "Flora", "params": setup.flora},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if setup.level != "dense":
        config["flora"] = {"gradients": setup.level, **setup.sketches}
    engine, *_ = flora_dist.deepspeed.initialize(model=model, config=config)

    def backward(loss: Tensor, is_last: bool) -> None:
        engine.backward(loss)
        if not is_last:
            engine.step()  # counts the micro-batch

    return Training(
        model=model,
        micro_batches=setup.micro_batches,
        forward=lambda sample, _: engine(sample),
        backward=backward,
        reduce=_nothing,
        step=engine.step,
    )


def _nothing() -> None:
    """The step does it."""


LAYOUTS: dict[str, Callable[[Setup], Training]] = {
    "ddp": _ddp,
    "ddp, PowerSGD": _ddp_powersgd,
    "ddp, flora_hook": _ddp_hook,
    "fsdp2": _fsdp2,
    "fsdp2, weights kept": _fsdp2_kept,
    "hsdp": _hsdp,
    **{f"zero-{stage}": _zero(stage) for stage in (0, 1, 2, 3)},
}
"""Name -> how a run on all ranks of the default group begins."""

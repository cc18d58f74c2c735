# SPDX-License-Identifier: Apache-2.0
"""A DeepSpeed engine that trains the zoo with Flora, on each rank; what its weights are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

import flora_dist.deepspeed
from flora_dist import Flora
from flora_dist.core.layouts.flat import FlatLayout, FlatPart
from flora_dist.core.sketch.keys import canonical_name
from tests.battery import zoo
from tests.battery.mutations import mutated
from tests.battery.oracle import STEPS, Case

Weights = dict[str, Tensor]

SAMPLES = 72  # divisible by 1, 2 and 3 ranks times 1, 3 and 4 micro-batches
MAX_NORM = 0.125
"""The norm of the zoo's gradient is above it at some steps and below at others."""
EXTRA_STEPS = 5
"""How many steps ``extra`` takes part in the loss."""
GROUPS: tuple[tuple[set[str], dict[str, Any]], ...] = (
    (
        {"single.bias", "conv.weight", "up.bias", "square.weight"},
        {"lr": 3e-3, "weight_decay": 0.1, "kappa": 2},
    ),
    # A group of one row of 13: stages 1 and 2 cut it twice on three ranks.
    ({"single.weight"}, {"lr": 2e-3}),
)
"""Names and settings of the parameter groups beside the first."""


class ZeroZoo(zoo.Zoo):
    """The zoo with a layer that early steps use and a matrix that no step does."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(zoo.WIDTH, 16)
        self.never = nn.Linear(11, 5, bias=False)

    def forward(self, tokens_BT: Tensor, use_extra: bool = True) -> Tensor:
        loss = super().forward(tokens_BT)
        if use_extra:
            loss = loss + self.extra(self.embed(tokens_BT)).tanh().square().mean()
        return loss


def build() -> ZeroZoo:
    """The model in fp32 with weights that are the same in every process."""
    model = ZeroZoo()
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for parameter in (*model.extra.parameters(), *model.never.parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run on an engine."""

    stage: int
    dtype: str = "fp32"
    accumulation: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    """Of Flora, over the battery's."""
    zero: dict[str, Any] = field(default_factory=dict)
    """Of the config's zero_optimization block."""
    config: dict[str, Any] = field(default_factory=dict)
    """Other blocks of the config."""
    groups: bool = False
    zero_init: bool = False
    stale: bool = False
    """Whether ``extra`` leaves the loss although its last gradient then stays."""
    mutation: str = ""
    """Of the battery; broken while the run trains."""

    @property
    def case(self) -> Case:
        return Case(dtype=torch.float32, settings=self.settings)

    def uses_extra(self, step: int) -> bool:
        return step < EXTRA_STEPS or (self.keeps_gradients and not self.stale)

    @property
    def keeps_gradients(self) -> bool:
        """Whether DeepSpeed 0.19.8 repeats the last gradient of what leaves the loss.

        It overwrites its buffers of gradients and never clears them, whatever the optimizer.
        """
        return self.stage == 3 or "offload_optimizer" in self.zero

    def __str__(self) -> str:
        options = {**self.settings, **self.zero, **self.config}
        words = [f"zero{self.stage}", self.dtype, *(f"{k}={v}" for k, v in options.items())]
        words += ["groups"] * self.groups + ["zero.Init"] * self.zero_init
        return " ".join(words)


def train(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """Whole weights, gradient norms by step, and counters by parameter, on every rank."""
    with mutated(run.mutation):
        engine, flora = start(run)
        norms = []
        for step in range(steps):
            take_step(engine, step, run.uses_extra(step))
            norms.append(float(engine.get_global_grad_norm() or 0.0))
        result = {
            "weights": whole_weights(engine),
            "norms": norms,
            "counts": counts(flora),
        }
        engine.destroy()
    return result


def start(run: Run) -> tuple[Any, Flora]:
    """A new engine and its Flora."""
    _allow_fp16()
    config = config_of(run)
    model = _build_partitioned(config) if run.zero_init else build()
    parameters = _groups(model) if run.groups else None
    engine, *_ = flora_dist.deepspeed.initialize(
        model=model, config=config, model_parameters=parameters
    )
    return engine, flora_dist.deepspeed.attach(engine)


def cuts_of(run: Run) -> dict[str, tuple[int, int]]:
    """(most cuts in one row, cut blocks) of each parameter, without training."""
    engine, flora = start(run)
    found = cuts(flora)
    engine.destroy()
    return found


def config_of(run: Run) -> dict[str, Any]:
    """The config, as a JSON file would have it."""
    shares = run.accumulation * dist.get_world_size()
    precision = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        "bf16 alone": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        # Without hysteresis the first overflow halves the scale.
        "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}},
    }
    return {
        "train_micro_batch_size_per_gpu": SAMPLES // shares,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": MAX_NORM,
        "steps_per_print": 10**9,
        "optimizer": {"type": "Flora", "params": run.case.flora},
        "zero_optimization": {"stage": run.stage, **run.zero},
        **precision[run.dtype],
        **run.config,
    }


def take_step(engine: Any, step: int, use_extra: bool = True) -> None:
    """One step on this rank's micro-batches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shares = zoo.batch(step, SAMPLES).chunk(engine.gradient_accumulation_steps() * world_size)
    for share in shares[rank::world_size]:
        loss = engine(share, use_extra)
        engine.backward(loss)
        engine.step()


def whole_weights(engine: Any) -> Weights:
    """The model's own weights of the parameters that train; in fp32 they are the masters."""
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {canonical_name(n): p.detach().clone() for n, p in named.items()}


def masters(engine: Any) -> Weights:
    """ZeRO's whole weights that are stepped, by DeepSpeed's own means, on every rank.

    In fp32, unless the run is in bf16 alone.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        copies = {id(p): c for ps, cs in pairs for p, c in zip(ps, cs, strict=True)}
        found = {n: copies[id(p)] for n, p in engine.module.named_parameters() if id(p) in copies}
    else:
        named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        # Stages 1 and 2 give fp32 copies of whatever is stepped.
        own = getattr(optimizer, "master_weights_and_grads_dtype", torch.float32)
        found = {n: safe_get_full_fp32_param(p).to(own) for n, p in named.items()}
    return {canonical_name(name): value.detach().clone() for name, value in found.items()}


def counts(flora: Flora) -> dict[str, set[tuple[int, int]]]:
    """(step, window) that this rank's states count, by parameter."""
    found: dict[str, set[tuple[int, int]]] = {}
    for tensor in flora.state:
        for name, state in states(flora, tensor).items():
            found.setdefault(name, set()).add((state["step"], state["window"]))
    return found


def states(flora: Flora, tensor: Tensor) -> dict[str, dict[str, Any]]:
    """The states that stand under a tensor, by parameter where it is a partition."""
    state = flora.state[tensor]
    nested = {name: value for name, value in state.items() if isinstance(value, dict)}
    return nested or {"whole": state}


def cuts(flora: Flora) -> dict[str, tuple[int, int]]:
    """(most cuts in one row, cut blocks) of each parameter in the layout that was attached."""
    layout = flora._roster._layouts[0]
    found = {}
    for part in _flat_parts(layout) if isinstance(layout, FlatLayout) else ():
        columns = part.shape[-1] if len(part.shape) > 1 else 1
        if len(part.shape) == 3 and part.shape[-1] < 8:  # a kernel: (rows, the rest)
            columns = part.shape[1] * part.shape[2]
        inner = [start for start, stop in part.span.owned if 0 < start < stop and start % columns]
        rows = [start // columns for start in inner]
        block = min(8, 1 << (columns.bit_length() - 1))
        found[part.name] = (max(map(rows.count, rows), default=0), len(part.cuts(block).blocks))
    return found


def _flat_parts(layout: FlatLayout) -> Iterable[FlatPart]:
    return (part for parts in layout._parts.values() for part in parts)


def settings_of(name: str) -> dict[str, Any]:
    """What a parameter's own group sets."""
    return next((settings for names, settings in GROUPS if name in names), {})


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first = [(n, p) for n, p in named.items() if not settings_of(n)]
    others = [({"params": [(n, named[n]) for n in named if n in ns]}, own) for ns, own in GROUPS]
    return [{"params": first}, *({**group, **own} for group, own in others)]


def _build_partitioned(config: dict[str, Any]) -> ZeroZoo:
    """Layers are cut as soon as they are made; values follow."""
    values = dict(build().named_parameters())
    known = {key: value for key, value in config.items() if key != "optimizer"}
    with deepspeed.zero.Init(config_dict_or_path=known):
        model = ZeroZoo()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
            parameter.copy_(values[name])
    return model


def _allow_fp16() -> None:
    """DeepSpeed takes fp16 for unknown to CPUs; torch computes it."""
    get_accelerator().is_fp16_supported = lambda: True

# SPDX-License-Identifier: Apache-2.0
"""The deepspeed backend: one of its engines as the loop's model, gradient and step."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from flora_dist.checkpoint import Loaded
from flora_dist.checkpoint.folder import tag_of
from flora_dist.frameworks.build_lock import telling
from flora_dist.frameworks.deepspeed.config import check_features, prepared
from flora_dist.trainer.by_stretches import partition_
from flora_dist.trainer.config import DENSE, Config, OptimizerConfig
from flora_dist.trainer.deepspeed_json import engine_settings
from flora_dist.trainer.optimizers import build_optimizer, schedule_factor
from flora_dist.trainer.optional_imports import needs_deepspeed_extra
from flora_dist.trainer.place import Rows
from flora_dist.trainer.replicated import Learner, Spread, World
from flora_dist.trainer.storage import Pending, Written


def check_engine(config: Config, world: World) -> None:
    """Find what DeepSpeed would refuse, before there is a process group or a file.

    Raises:
        ValueError: no package, another accelerator, or a config that contradicts the run's.
    """
    settings = engine_settings(config, world.size)
    _import_deepspeed(world)
    prepared(settings)
    if config.optimizer.name == "flora":
        check_features(settings)
        from flora_dist.frameworks.deepspeed.masters import with_states

        with_states(settings)
    from deepspeed.runtime.zero.config import get_zero_config
    from pydantic import ValidationError

    try:
        get_zero_config(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ValueError(
            f"{config.backend.config} must be a config that DeepSpeed accepts; "
            f"{where}={first['input']!r}: {first['msg']}. Correct it."
        ) from error


def build_engine(
    model: nn.Module,
    optimizer: OptimizerConfig,
    config: Config,
    world: World,
    stretches: Rows | None,
) -> Learner:
    """An engine around the model, with the optimizer and the run's schedule.

    ``stretches``: of a model without memory, which ZeRO-3 partitions; None: it has its weights.
    """
    from flora_dist import Flora
    from flora_dist import deepspeed as flora_deepspeed

    deepspeed = _import_deepspeed(world)
    os.environ.setdefault("LOCAL_RANK", "0")  # wanted without a launcher too: one process
    settings = prepared(engine_settings(config, world.size))
    # Before parameters are partitioned, which have no shape of their own afterwards.
    built = build_optimizer(optimizer, model.named_parameters(), seed=config.train.seed)
    factor = schedule_factor(config.schedule, config.train.steps)
    initialize: Callable[..., Any] = telling()(deepspeed.initialize)
    if isinstance(built, Flora):
        initialize = flora_deepspeed.initialize
    with _only_process_zero_speaks(world):
        if stretches is not None:
            partition_(model, stretches, settings, world.device)
        engine, _, _, scheduler = initialize(
            model=model,
            optimizer=built,
            config=settings,
            lr_scheduler=lambda inner: LambdaLR(inner, factor),
        )
    is_sketched = isinstance(built, Flora) and config.gradients.level != DENSE
    return Learner(
        spread=_spread(engine, built),
        optimizer=built,
        scheduler=scheduler,
        gradients=flora_deepspeed.gradient_report(engine) if is_sketched else None,
        storage=_EngineStorage(engine=engine),
    )


@dataclass(frozen=True, kw_only=True)
class _EngineStorage:
    """Checkpoints of an engine, of the same form as every other backend's."""

    engine: Any

    def save(
        self, folder: Path, *, step: int, extra: Mapping[str, Any], keep: int | None
    ) -> Pending:
        from flora_dist.deepspeed import save_checkpoint

        return Written(
            path=save_checkpoint(self.engine, folder, tag_of(step), extra=extra, keep=keep)
        )

    def load(self, path: Path) -> Loaded:
        """Put a checkpoint in place."""
        from flora_dist.deepspeed import load_checkpoint

        return load_checkpoint(self.engine, path)


def _spread(engine: Any, optimizer: torch.optim.Optimizer) -> Spread:
    # Stage 3 leaves an empty parameter and keeps this process's part beside it.
    own = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    places = {tensor.untyped_storage().data_ptr() for tensor in own}

    @contextmanager
    def counting(last: bool) -> Iterator[None]:
        yield
        if not last:
            engine.step()  # between boundaries it only counts the micro-batch

    def update(_: torch.optim.Optimizer, __: LambdaLR) -> None:
        engine.step()  # clips, steps, clears the gradients and moves the scheduler

    def norm(_: torch.optim.Optimizer) -> float | None:
        found = engine.get_global_grad_norm()  # None at stage 0 where nothing is clipped
        return None if found is None else float(found)

    def weights() -> list[torch.Tensor]:
        # Stage 0 steps the model's own parameters, and bfloat16-pure their memory.
        masters = (t for t in optimizer.state if t.untyped_storage().data_ptr() not in places)
        return [*own, *masters]

    return Spread(
        module=engine,
        synchronising=counting,
        arithmetic=nullcontext,
        update=update,
        norm=norm,
        norm_comes_late=True,
        weights=weights,
        trained=lambda: list(optimizer.state),
        # The loop has divided by the tokens of the global batch: accumulation is in that already.
        backward=lambda loss: engine.backward(loss, scale_wrt_gas=False),
        close=engine.destroy,
    )


def _import_deepspeed(world: World) -> Any:
    """The package, on the accelerator on which the run computes."""
    # Read once, at the first import; the package otherwise looks for accelerators by itself.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    with needs_deepspeed_extra():
        import deepspeed
    from deepspeed.accelerator import get_accelerator

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING if world.speaks else logging.ERROR)
    # Said of every optimizer but DeepSpeed's own and torch's Adam; attach() has proved the layout.
    logger.addFilter(_is_not_about_flora)
    # DeepSpeed 0.19 calls by its old name what torch 2.13 has renamed; every process would say so.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    found = get_accelerator().device_name()
    if torch.device(found).type != world.device.type:
        raise ValueError(
            f"DeepSpeed must compute where the run does; it has {found!r}, the run "
            f"{world.device.type!r}. Set the variable DS_ACCELERATOR={world.device.type}."
        )
    return deepspeed


def _is_not_about_flora(record: logging.LogRecord) -> bool:
    return "ZeRO with an untested optimizer" not in record.getMessage()


@contextmanager
def _only_process_zero_speaks(world: World) -> Iterator[None]:
    """DeepSpeed prints on every process that it has compiled its helper."""
    with nullcontext() if world.speaks else redirect_stdout(io.StringIO()):
        yield

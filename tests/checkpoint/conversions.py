# SPDX-License-Identifier: Apache-2.0
"""Runs that leave a checkpoint of a framework's own form and one of ours, of the same moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import flora_dist.deepspeed
from flora_dist import Flora, checkpoint
from tests.battery import zoo
from tests.battery.oracle import Case
from tests.checkpoint.layouts import LAYOUTS
from tests.zero import engines, small
from tests.zero.checkpoints import crowded
from tests.zero.engines import Run

HALF, END = 4, 8
"""Steps before a checkpoint and at the end; a window is three."""


def zoo_on_an_engine(run: Run, folder: Path) -> None:
    engine, _ = engines.start(run)
    for step in range(HALF):
        engines.take_step(engine, step)
    _save_both(engine, folder)


def crowd_on_an_engine(config: small.Config, folder: Path) -> None:
    """Frozen parameters and buffers; names are those of the module alone."""
    engine, _ = small.start(config, model=crowded())
    small.train(engine, range(HALF))
    _save_both(engine, folder)


def _save_both(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder / "native"), client_state={"seen": HALF})
    flora_dist.deepspeed.save_checkpoint(engine, folder / "ours", extra={"seen": HALF})
    engine.destroy()


def zoo_on_fsdp2(flat: bool, folder: Path) -> None:
    trained = LAYOUTS["fsdp2 x2"][1](Case(dtype=torch.float32), zoo.build(torch.float32))
    trained.run(range(HALF))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = get_state_dict(trained.model, trained.optimizer, options=options)
    content = {"model": model, "optimizer": optimizer, "seen": HALF, "when": torch.zeros(2)}
    dcp.save(content, checkpoint_id=folder / "native")
    checkpoint.save(
        folder / "ours", trained.model, trained.optimizer, step=HALF, extra={"seen": HALF}
    )


# ---- plain runs, in the test's own process


def plain(run: Run | None = None) -> tuple[nn.Module, Flora]:
    """The model of engines, or the battery's, with an optimizer of what trains."""
    model = zoo.build(torch.float32) if run is None else engines.build()
    case = Case() if run is None else run.case
    if run is not None and run.groups:
        return model, Flora(engines._groups(model), **case.flora)
    parameters = model.named_parameters()
    if run is not None:  # engines leave frozen parameters out
        parameters = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return model, Flora(parameters, **case.flora)


def go_on(model: nn.Module, optimizer: Flora, steps: range, samples: int) -> dict[str, Tensor]:
    for step in steps:
        model(zoo.batch(step, samples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

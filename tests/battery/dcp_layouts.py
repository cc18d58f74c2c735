# SPDX-License-Identifier: Apache-2.0
"""The zoo on each layout that torch's own checkpoints know, and torch's ways to save and load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from flora_dist import Flora
from tests.battery import wrapped, zoo
from tests.battery.oracle import SAMPLES, STEPS, Case
from tests.battery.variants import local_state, whole_weights
from tests.battery.wrapped import ALIGNED, CUT, Layout

Everything = dict[str, Any]

# Five steps end inside a window of three.
HALF = 5
CASE = Case(settings={"momentum": "flora", "weight_decay": 0.1})


@dataclass
class Run:
    """A model as its framework wrapped it, its optimizer, and how it is held."""

    model: nn.Module
    optimizer: Flora
    layout: Layout

    def train(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            self.model(self.layout.share(zoo.batch(step, SAMPLES))).backward()
            self.optimizer.step()

    def everything(self) -> Everything:
        return {**whole_weights(self.model), **local_state(self.optimizer)}


NAMES = ("plain", "ddp x2", "fsdp2 x2", "fsdp2 x3", "fsdp2 x4", "hsdp 2x2", ALIGNED, CUT)
LAYOUTS = {name: wrapped.LAYOUTS[name] for name in NAMES}


def build(layout: str, case: Case = CASE, *, blank: bool = False) -> Run:
    """``blank``: weights that a checkpoint has to replace."""
    model = zoo.build(case.dtype)
    if blank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
    held = LAYOUTS[layout].wrap(model)
    return Run(held, Flora(held.named_parameters(), **case.flora), LAYOUTS[layout])


# ---- ways to save and to load: the step that is taken before an asynchronous one has ended


def _states(run: Run, *, flatten: bool = False) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options),
    }


def _save(run: Run, folder: Path, *, flatten: bool = False) -> None:
    dcp.save(_states(run, flatten=flatten), checkpoint_id=folder)


def _load(run: Run, folder: Path, *, flatten: bool = False) -> None:
    states = _states(run, flatten=flatten)
    dcp.load(states, checkpoint_id=folder)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    set_model_state_dict(run.model, states["model"])
    set_optimizer_state_dict(run.model, run.optimizer, states["optimizer"], options=options)


def _save_later(run: Run, folder: Path) -> None:
    # The thread that saves talks in the group it is given: not in that of the training.
    future = dcp.async_save(_states(run), checkpoint_id=folder, process_group=dist.new_group())
    # What training changes meanwhile must not get into the files.
    tensors = [*run.model.parameters(), *_state_tensors(run.optimizer)]
    copies = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(7.0)
    future.result()  # type: ignore[union-attr]
    with torch.no_grad():
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)


def _state_tensors(optimizer: Flora) -> list[Tensor]:
    states = optimizer.state.values()
    return [v for state in states for v in state.values() if isinstance(v, Tensor)]


def _save_together(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def _load_together(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def _save_full(run: Run, folder: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = (
        get_model_state_dict(run.model, options=options),
        get_optimizer_state_dict(run.model, run.optimizer, options=options),
    )
    if dist.get_rank() == 0:
        folder.mkdir()
        torch.save(states, folder / "full.pt")
    dist.barrier()


def _load_full(run: Run, folder: Path) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    if dist.get_rank() == 0:
        weights, state = torch.load(folder / "full.pt", weights_only=True)
    set_model_state_dict(run.model, weights, options=options)
    set_optimizer_state_dict(run.model, run.optimizer, state, options=options)


Way = tuple[Callable[[Run, Path], None], Callable[[Run, Path], None]]
WAYS: dict[str, Way] = {
    "nested": (_save, _load),
    "flattened": (partial(_save, flatten=True), partial(_load, flatten=True)),
    "asynchronous": (_save_later, _load),
    "together": (_save_together, _load_together),
    "full, from rank 0": (_save_full, _load_full),
}


# ---- on each rank


def save_half_way(layout: str, ways: list[str], folder: Path) -> list[Everything]:
    """Train half, save in several ways, train on; everything at both moments."""
    run = build(layout)
    run.train(range(HALF))
    for way in ways:
        WAYS[way][0](run, folder / way)
    saved = run.everything()
    run.train(range(HALF, STEPS))
    return [saved, run.everything()]


def go_on(layout: str, way: str, folder: Path) -> list[Everything]:
    """Load into a blank model and a new optimizer, train on; everything at both moments."""
    run = build(layout, blank=True)
    WAYS[way][1](run, folder / way)
    loaded = run.everything()
    run.train(range(HALF, STEPS))
    return [loaded, run.everything()]


def save_at_the_start(layout: str, way: str, folder: Path) -> None:
    """Before any step."""
    WAYS[way][0](build(layout), folder / way)


def go_on_from_the_start(layout: str, way: str, folder: Path) -> Everything:
    """Load what was saved before any step, and train through."""
    run = build(layout, blank=True)
    WAYS[way][1](run, folder / way)
    run.train(range(STEPS))
    return run.everything()


def refused(layout: str, way: str, folder: Path) -> tuple[str, list[str]]:
    """The error of loading on this rank, and what of the weights and state has changed."""
    run = build(layout)
    run.train(range(2))
    before = run.everything()
    try:
        WAYS[way][1](run, folder / way)
    except BaseException as error:  # DCP's own is no Exception
        return f"{type(error).__name__}: {error}", _changed(before, run.everything())
    return "", []


def _changed(before: Everything, after: Everything) -> list[str]:
    same = {
        name
        for name, value in before.items()
        if (torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name])
    }
    return sorted(set(after) - same)


# ---- one matrix, cut by tensor parallelism


def narrow_run(columns: int) -> tuple[nn.Module, Flora]:
    """A matrix of so many columns in blocks of 8, its columns cut over all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 9, bias=False, dtype=torch.float64))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    optimizer = Flora(model.named_parameters(), **CASE.flora)
    for step in range(2):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, columns, generator=generator, dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save_narrow(columns: int, way: str, folder: Path) -> tuple[int, ...]:
    """The shape of the momentum as torch sees it."""
    model, optimizer = narrow_run(columns)
    WAYS[way][0](Run(model, optimizer, LAYOUTS[CUT]), folder / way)
    (state,) = optimizer.state.values()
    return tuple(state["momentum"].shape)


def load_narrow(columns: int, way: str, folder: Path, mutation: str = "") -> tuple[str, Any]:
    """The error, and the shape of the momentum here."""
    from flora_dist.core.parameters.trainable import Trainable

    original = Trainable.column_shards
    if mutation:
        Trainable.column_shards = None  # type: ignore[assignment]
    try:
        model, optimizer = narrow_run(columns)
        (state,) = optimizer.state.values()
        try:
            WAYS[way][1](Run(model, optimizer, LAYOUTS[CUT]), folder / way)
        except BaseException as error:  # DCP's own is no Exception
            return f"{type(error).__name__}: {error}", tuple(state["momentum"].shape)
        return "", tuple(state["momentum"].shape)
    finally:
        Trainable.column_shards = original  # type: ignore[method-assign]

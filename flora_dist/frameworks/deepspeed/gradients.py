# SPDX-License-Identifier: Apache-2.0
"""Gradients of a DeepSpeed engine as sketches: what its reducers pass by, and who averages instead.

ZeRO's reducers leave a parameter alone whose ``ds_grad_is_ready`` is False; a hook takes the full
gradient, micro-batch after micro-batch, and frees it. Private names of DeepSpeed 0.19.8; every
backward proves that they still mean what they did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, z3_leaf_parameter
from torch import Tensor, nn

from flora_dist.core.comm.groups import GroupReducer
from flora_dist.core.layouts.flat import FlatPart, Span
from flora_dist.core.layouts.replicated import whole
from flora_dist.core.parameters.registry import takes_part
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.state.spec import LEVELS, Geometry, matrix_sizes
from flora_dist.core.tiles import Tile, tiles_of_span
from flora_dist.flora import Flora
from flora_dist.frameworks.deepspeed import lean as lean_buffers
from flora_dist.frameworks.deepspeed.config import TESTED, gradient_request, refusal
from flora_dist.frameworks.deepspeed.lean import make_lean
from flora_dist.frameworks.deepspeed.steps import EngineSketches, join
from flora_dist.frameworks.deepspeed.zero_grad import drop_with_zero_grad, names_needed
from flora_dist.gradients.attach import Handle
from flora_dist.gradients.flow import Adapter, Source, geometry_for
from flora_dist.gradients.report import GradientReport
from flora_dist.gradients.request import SketchRequest
from flora_dist.gradients.route import Route

_handles: WeakKeyDictionary[Flora, Handle] = WeakKeyDictionary()
_IN_A_LEAF = "in a leaf module of ZeRO-3, whose gradients DeepSpeed takes together"
_ZERO = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)

Parameters = Mapping[str, nn.Parameter]


def gradient_report(engine: DeepSpeedEngine) -> GradientReport:
    """What of an engine's gradients is sketched, what is dense and why; bytes kept and sent.

    Raises:
        ValueError: its gradients are dense.
    """
    flora = getattr(engine.optimizer, "optimizer", engine.optimizer)
    handle = _handles.get(flora)
    if handle is None:
        raise ValueError(
            "only an engine whose gradients are sketched has a report of them; this one's are "
            'dense. Set "flora": {"gradients": "compressed"} in its config.'
        )
    return handle.report()


def check_compressible(engine: DeepSpeedEngine) -> None:
    """Refuse an engine whose gradients cannot be taken as its config asks.

    Raises:
        ValueError: an optimizer of DeepSpeed's that is not known, or sequence parallelism.
        RuntimeError: this version of DeepSpeed lacks a name that is needed.
    """
    if gradient_request(engine.config).gradients == LEVELS[0]:
        return
    optimizer = engine.optimizer
    if type(optimizer) not in {*_ZERO, FP16_UnfusedOptimizer, Flora}:
        raise refusal(
            f"{type(optimizer).__name__} and compressed gradients",
            "it takes gradients into buffers of its own. Use ZeRO stage 2",
        )
    if engine.sequence_parallel_size > 1:
        raise refusal(
            "sequence parallelism and compressed gradients",
            "DeepSpeed's stages then divide by different numbers of ranks. Leave "
            '"flora"."gradients" out',
        )
    for name in _names_needed(engine):
        if not hasattr(optimizer, name):
            raise RuntimeError(
                f"{type(optimizer).__name__} must have {name!r}, as in DeepSpeed {TESTED}; that "
                f"of {deepspeed.__version__} does not have it. Use DeepSpeed {TESTED}, or leave "
                '"flora"."gradients" out of the config.'
            )


def _names_needed(engine: DeepSpeedEngine) -> tuple[str, ...]:
    if type(engine.optimizer) not in _ZERO:
        return ()
    is_third = type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3
    norm = "_get_norm_groups" if is_third else "scaled_global_norm"
    steps = (norm, "unscale_and_clip_grads", "register_grad_acc_post_hook")
    buffers = lean_buffers.names_needed(engine.optimizer)
    return (*steps, *buffers, *names_needed(engine.optimizer))


def sketch_gradients(engine: DeepSpeedEngine, flora: Flora, names: Mapping[int, str]) -> None:
    """Follow the config's "flora" block; nothing where gradients stay dense.

    Args:
        engine: whose layout the optimizer knows already.
        flora: its optimizer, which has not stepped.
        names: of the module's parameters, by identity.
    """
    request = gradient_request(engine.config)
    if request.gradients == LEVELS[0]:
        return
    parameters = {names[id(p)]: p for p in engine.module.parameters()}
    slots = [slot for slot in flora.slots() if takes_part(slot)]
    sizes = {slot.part.name: _size(slot, parameters, request) for slot in slots}
    adapter = _adapter(
        engine, [s for s in slots if sizes[s.part.name].rank is not None], parameters
    )
    handle = _handles[flora] = Handle(engine.module, flora, slots, sizes, adapter, request)
    if engine.optimizer is not flora:
        lean = make_lean(
            engine.optimizer,
            slots,
            sketched=[parameters[name] for name, size in sizes.items() if size.rank is not None],
            every=[parameters[slot.part.name] for slot in slots],
        )
        sketched = EngineSketches(handle.gradients, slots)
        join(engine.optimizer, sketched, lean)
        drop_with_zero_grad(engine, flora, sketched)
    # What had come in before is of another run.
    flora.register_load_state_dict_post_hook(lambda _: handle.gradients.forget())


def _size(slot: Trainable, parameters: Parameters, request: SketchRequest) -> Geometry:
    size = geometry_for(slot, request)
    if size.rank is not None and z3_leaf_parameter(parameters[slot.part.name]):
        return replace(size, rank=None, dense_because=_IN_A_LEAF)
    return size


def _adapter(
    engine: DeepSpeedEngine, slots: Sequence[Trainable], parameters: Parameters
) -> Adapter:
    if type(engine.optimizer) in _ZERO:
        return _adapter_of_zero(engine, slots, parameters)
    return _adapter_of_stage_0(engine, slots, parameters)


# ---- ZeRO 1, 2 and 3


def _adapter_of_zero(
    engine: DeepSpeedEngine, slots: Sequence[Trainable], parameters: Parameters
) -> Adapter:
    optimizer: Any = engine.optimizer
    # A weight that is offloaded is not where its gradient arrives.
    device = torch.device(get_accelerator().current_device_name())
    return Adapter(
        sources=[
            Source(
                tensor=parameters[slot.part.name],
                visible=None,
                tiles=whole(slot.part.shape),
                route=_route(optimizer, slot.part),
                device=device,
            )
            for slot in slots
        ],
        install=partial(_pass_by, optimizer),
        is_last=engine.is_gradient_accumulation_boundary,
    )


def _route(optimizer: Any, part: Any) -> Route:
    """Whoever holds a piece of a block keeps the whole of its sketch."""
    assert isinstance(part, FlatPart)
    group = part.reducer.group if isinstance(part.reducer, GroupReducer) else None
    size = 1 if group is None else dist.get_world_size(group)
    # Stage 3 knows the mean alone.
    averages = getattr(optimizer, "gradient_average", True)
    return Route(
        kept=tuple(_tiles(part.span)),
        scatter=group,
        divisor=size if averages else 1.0,
    )


def _tiles(span: Span) -> Iterator[tuple[Tile, ...]]:
    _, rows, columns = matrix_sizes(span.shape)
    for start, stop in span.owned:
        yield tiles_of_span(start, stop, num_rows=rows, num_columns=columns)


def _pass_by(optimizer: Any, sources: Sequence[Source]) -> None:
    parameters: list[Any] = [source.tensor for source in sources]
    for parameter in parameters:
        parameter.ds_grad_is_ready = False
        # After DeepSpeed's own hook, before the one that takes the gradient.
        parameter.register_post_accumulate_grad_hook(partial(_check_left, optimizer))
    optimizer.register_grad_acc_post_hook(partial(_check_taken, parameters))


def _check_left(optimizer: Any, parameter: Tensor) -> None:
    """Raise if the reducer has just put a sketched parameter's gradient into a bucket."""
    is_third = type(optimizer) is DeepSpeedZeroOptimizer_Stage3
    for bucket in optimizer.ipg_buckets.values():
        if not bucket.params:
            continue
        last = bucket.params[-1]
        if last is parameter if is_third else last[-1] == optimizer.get_param_id(parameter):
            raise _broken(f"the reducer took one of shape {tuple(parameter.shape)}")


def _check_taken(parameters: Sequence[Tensor]) -> None:
    """Raise after a backward that left a full gradient behind."""
    for parameter in parameters:
        if parameter.grad is not None:
            raise _broken(f"one of shape {tuple(parameter.grad.shape)} was left in .grad")


def _broken(what: str) -> RuntimeError:
    return RuntimeError(
        f"full gradients of sketched parameters must be left to their hooks; {what} with "
        f"DeepSpeed {deepspeed.__version__}. Use DeepSpeed {TESTED}, and write neither .grad nor "
        "ds_grad_is_ready."
    )


# ---- stage 0


def _adapter_of_stage_0(
    engine: DeepSpeedEngine, slots: Sequence[Trainable], parameters: Parameters
) -> Adapter:
    """Every rank keeps everything; the wrapper of low precision has fp32 copies of its own."""
    group = groups._get_sequence_data_parallel_group()
    size = dist.get_world_size(group)
    is_visible = type(engine.optimizer) is Flora
    sources = []
    for slot in slots:
        parameter, tiles = parameters[slot.part.name], whole(slot.part.shape)
        route = Route(
            kept=(tiles,),
            sums=(group,) if size > 1 else (),
            divisor=size if engine.gradient_average else 1.0,
        )
        sources.append(
            Source(
                tensor=parameter,
                visible=parameter if is_visible else None,
                tiles=tiles,
                route=route,
            )
        )
    return Adapter(
        sources=sources,
        install=partial(_leave_out, engine),
        is_last=engine.is_gradient_accumulation_boundary,
    )


def _leave_out(engine: DeepSpeedEngine, sources: Sequence[Source]) -> None:
    optimizer = engine.optimizer
    sketched = {id(source.tensor) for source in sources}

    def get_grads_for_reduction() -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        found = []
        for parameter in engine.module.parameters():
            if not parameter.requires_grad or not parameter.numel() or id(parameter) in sketched:
                continue
            if parameter.grad is None:  # here; another rank may have one
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found, {}

    optimizer.get_grads_for_reduction = get_grads_for_reduction
    if type(optimizer) is Flora:  # nothing of DeepSpeed's lies between
        engine.clip_fp32_gradients = lambda: optimizer.clip_grad_norm_(engine.gradient_clipping())

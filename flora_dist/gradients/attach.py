# SPDX-License-Identifier: Apache-2.0
"""Keep gradients as sketches: ``attach(model, optimizer, gradients=...)``, once, after sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from flora_dist.core.comm.groups import Peers
from flora_dist.core.consistency.compare import check
from flora_dist.core.parameters.registry import takes_part
from flora_dist.core.parameters.source import DenseGradients
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.state.spec import Geometry
from flora_dist.flora import Flora
from flora_dist.gradients.cycle import Gradients, arrived
from flora_dist.gradients.flow import (
    Adapter,
    Source,
    flow_for,
    geometry_for,
)
from flora_dist.gradients.fused import FusedWeight, fuse
from flora_dist.gradients.on_ddp import adapter_of_ddp
from flora_dist.gradients.on_fsdp2 import adapter_of_shards, adapter_of_unsharded
from flora_dist.gradients.on_plain import adapter_of_plain
from flora_dist.gradients.report import GradientReport, row_of
from flora_dist.gradients.request import SketchRequest

_attached: WeakKeyDictionary[Flora, Handle] = WeakKeyDictionary()


def attach(  # noqa: PLR0913 - it names every setting: users and their editors read it
    model: nn.Module,
    optimizer: Flora,
    gradients: str,
    *,
    gradient_rank: int | None = None,
    gradient_bits: int | None = None,
    wire_bits: int | None = None,
    wire_dtype: str = "float32",
    bucket_cap_mb: float | None = None,
) -> Handle:
    """Keep gradients as sketches from backward to step (arXiv 2402.03293, Algorithm 1).

    Every gradient that arrives is multiplied by a small random matrix, added to an accumulator and
    freed; the step then works on the unbiased estimate that the sketches stand for, with a fresh
    projection every step. Call it on every rank, after sharding and before the first step. Clip
    with ``optimizer.clip_grad_norm_``; torch's own clipping and GradScaler raise.

    Args:
        model: the model that is trained: plain, DDP, FSDP2, HSDP, FSDP2 over tensor parallelism.
        optimizer: over its parameters. Those it keeps dense (1-D, ``rank=None``) stay on the
            framework's own path.
        gradients: "sharded": the framework reduces full gradients, this rank keeps sketches of its
            shard. "compressed": sketches of full gradients are kept and averaged, once per step,
            in place of gradients. "fused": the same, and linear layers never form the gradient,
            but where their weight is another tensor at that forward (``functional_call``, tied
            later, masked) or has a hook; call ``backward()`` without ``inputs=``, which would
            leave the sketches out.
        gradient_rank: numbers per block, over the blocks of the optimizer's groups; None: their
            ``rank``, or below 16 bits all numbers of a block.
        gradient_bits: of each number that is kept: 32, 16, or 8, 4, 2 or 1 with a scale per block.
            None: 4 under "compressed" where nothing is said of ranks, bits and dtypes, else 32.
        wire_bits: of each number that travels under "compressed"; None: ``gradient_bits``.
        wire_dtype: what travels in 32 bits: "float32", or "bfloat16", which is ``wire_bits=16``.
        bucket_cap_mb: MiB of a message in few bits under "compressed". A bucket of parameters is
            sent when its last gradient of the last micro-batch is in, while backward goes on; all
            other micro-batches must then be in DDP's ``no_sync()`` or FSDP2's
            ``set_requires_gradient_sync(False)``. None: one message, at the step.

    Returns:
        A handle: ``report()``, ``remove()``. The same one for a second call with the same
        arguments.

    Raises:
        TypeError: the optimizer is not Flora.
        ValueError: a level this model cannot have, a setting that cannot be right, an optimizer
            that has stepped with dense gradients, or ranks that differ; nothing has changed then.
    """
    if not isinstance(optimizer, Flora):
        raise TypeError(
            f"attach needs a Flora; got {type(optimizer).__name__}. Pass the optimizer inside, if "
            "a framework has wrapped it."
        )
    request = SketchRequest(
        gradients=gradients,
        gradient_rank=gradient_rank,
        gradient_bits=gradient_bits,
        wire_bits=wire_bits,
        wire_dtype=wire_dtype,
        bucket_cap_mb=bucket_cap_mb,
    )
    known = _attached.get(optimizer)
    if known is not None:
        if known.request == request and known.model() is model:
            return known
        raise ValueError(
            "an optimizer can keep gradients in one way only; this one is attached as "
            f"{known.request}; it is asked for {request}. Call remove() on its handle first."
        )
    if not optimizer.state:
        optimizer.take_names(model)
    peers = _peers(model)
    if peers is not None:  # first of all: what follows talks to others, by level and names
        check(optimizer, peers, asked=request.words())
    request.check()
    slots = [slot for slot in optimizer.slots() if takes_part(slot)]
    _check_owned(slots, model)
    sizes = {slot.part.name: geometry_for(slot, request) for slot in slots}
    sketched = [slot for slot in slots if sizes[slot.part.name].rank is not None]
    adapter = _adapter(model, sketched, gradients)
    _check_free(sketched, adapter.sources)
    handle = Handle(model, optimizer, slots, sizes, adapter, request)
    _attached[optimizer] = handle
    return handle


def _peers(model: nn.Module) -> Peers:
    """The ranks that train the model together, where the model tells them; None: it does not."""
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def _check_owned(slots: Sequence[Trainable], model: nn.Module) -> None:
    own = set(map(id, model.parameters()))
    for slot in slots:
        if id(slot.tensor) not in own:
            raise ValueError(
                f"every parameter of the optimizer must belong to the model; {slot.part.name!r} "
                "does not. Pass the model that is trained, after wrapping and sharding."
            )


def _check_free(slots: Sequence[Trainable], sources: Sequence[Source]) -> None:
    """Refuse what an earlier handle takes the gradients of: its hooks would leave nothing here."""
    for slot, source in zip(slots, sources, strict=True):
        tensor: Any = source.tensor
        hooks = (tensor._post_accumulate_grad_hooks or {}).values()
        if any(getattr(hook, "func", None) is arrived and hook.args[0]() for hook in hooks):
            raise ValueError(
                "a gradient can be kept as sketches by one optimizer at a time; that of "
                f"{slot.part.name!r} is kept by an earlier attach() to another. Call remove() on "
                "that handle first."
            )


def _check_late(request: SketchRequest, slot: Trainable) -> None:
    """Refuse a matrix that began to train after ``attach``: its gradient would stay dense."""
    if geometry_for(slot, request).rank is not None:
        raise ValueError(
            f"attach covers the parameters that train when it is called; {slot.name!r} was added "
            "or unfrozen since. Call remove() on the handle, and attach again; under DeepSpeed "
            "build the engine anew."
        )


def _adapter(model: nn.Module, slots: Sequence[Trainable], level: str) -> Adapter:
    """That of the model's framework."""
    kinds = [type(module) for module in model.modules()]
    if any(issubclass(kind, FullyShardedDataParallel) for kind in kinds):
        raise ValueError(
            "FSDP1 reduces the flat gradient of a whole unit and shows no parameter's own before; "
            f"gradients={level!r} needs it. Use FSDP2 (fully_shard)."
        )
    if level == "fused" and any(map(_replicates, model.modules())):
        raise ValueError(
            "DataParallel copies layers to other devices at each forward, and a fused layer would "
            'compute with the weight of the first. Use DistributedDataParallel, or "compressed".'
        )
    if hasattr(model, "zero_optimization"):
        raise ValueError(
            "an engine of DeepSpeed takes the level from its config. Set "
            f'"flora": {{"gradients": "{level}"}} there and call flora_dist.deepspeed.initialize.'
        )
    if any(issubclass(kind, FSDPModule) for kind in kinds):
        # At "sharded" FSDP2 reduces as ever; what is taken is this rank's shard of the mean.
        make = adapter_of_shards if level == "sharded" else adapter_of_unsharded
        return make(model, slots)
    if isinstance(model, DistributedDataParallel):
        if level == "sharded":
            raise ValueError(
                "DDP shards nothing and reduces after the gradients are complete on each rank; "
                "gradients='sharded' has nothing to keep. Use gradients='compressed'."
            )
        return adapter_of_ddp(model, slots)
    if any(issubclass(kind, DistributedDataParallel) for kind in kinds):
        raise ValueError(
            "attach takes the DDP module itself; the model holds one inside. Pass that one."
        )
    return adapter_of_plain(slots)


def _replicates(module: nn.Module) -> bool:
    return isinstance(module, nn.DataParallel) and len(module.device_ids) > 1


class Handle:
    """Gradients of one model that are kept as sketches."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Flora,
        slots: Sequence[Trainable],
        sizes: Mapping[str, Geometry],
        adapter: Adapter,
        request: SketchRequest,
    ) -> None:
        """Hooks are in place afterwards."""
        self.model, self.request = ref(model), request
        self._optimizer, self._adapter = ref(optimizer), adapter
        chosen = [slot for slot in slots if sizes[slot.part.name].rank is not None]
        flows = [
            flow_for(slot, source, sizes[slot.part.name], optimizer)
            for slot, source in zip(chosen, adapter.sources, strict=True)
        ]
        self.gradients = Gradients(
            flows,
            level=request.gradients,
            wire=request.wire,
            adapter=adapter,
            known=frozenset(sizes),
            check_late=partial(_check_late, request),
        )
        optimizer.attach_gradients(self.gradients)
        adapter.install(adapter.sources)
        self._sizes = sizes
        engines = [_hooks_of_engine(flow.source) for flow in flows]
        self._hooks = [
            _hook(flow.source.tensor, partial(arrived, ref(self.gradients), flow.part.name))
            for flow in flows
        ]
        # They hold no weights. What the optimizer leaves behind, its successor would not be given.
        finalize(self.gradients, _remove_all, tuple(self._hooks)).atexit = False
        # Hooks stay beside fused layers: other modules may use the same weights.
        everything = zip(flows, engines, self._hooks, strict=True)
        weights = {
            id(flow.source.in_module): FusedWeight(
                flow=flow, tensor=flow.source.tensor, hooks=known | {hook.id}
            )
            for flow, known, hook in everything
        }
        self._fused = fuse(model, self.gradients, weights if request.gradients == "fused" else {})
        self._hooks.append(optimizer.register_load_state_dict_post_hook(self._refresh))

    def _refresh(self, _: torch.optim.Optimizer) -> None:
        self._fused.refresh()

    def report(self) -> GradientReport:
        """Per parameter: sketched where, or dense and why; bytes kept and bytes sent per step."""
        flows, where, level = self.gradients.flows, self._fused.where, self.request.gradients
        return GradientReport(
            level=level,
            rows=tuple(
                row_of(
                    name,
                    size,
                    flows.get(name),
                    where=where.get(name, level),
                    wire=self.request.wire,
                )
                for name, size in self._sizes.items()
            ),
        )

    def remove(self) -> None:
        """Restore everything; the optimizer must not have stepped with sketches by then.

        Raises:
            ValueError: it has: what it keeps belongs to another algorithm.
        """
        optimizer = self._optimizer()
        if optimizer is not None and _attached.get(optimizer) is self:
            optimizer.attach_gradients(DenseGradients())
            del _attached[optimizer]
        self.gradients.forget()
        _remove_all(self._hooks)
        self._hooks.clear()
        self._fused.remove()
        self._adapter.restore()


def _remove_all(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _hook(tensor: Any, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Torch's method has no types."""
    handle: RemovableHandle = tensor.register_post_accumulate_grad_hook(hook)
    return handle


def _hooks_of_engine(source: Source) -> frozenset[int]:
    """An engine's own, which know that gradients are taken away; other frameworks have none."""
    tensor: Any = source.tensor
    return frozenset(tensor._post_accumulate_grad_hooks or () if source.visible is None else ())

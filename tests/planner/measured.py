# SPDX-License-Identifier: Apache-2.0
"""Bytes that one rank of a real run holds and sends, category by category, as the planner has them.

Weights and state are the storages that parameters, masters and state tensors have between two
steps. Gradients and accumulators are what is alive after any of a step's backwards, at the most.
Activations are the storages that autograd keeps of one forward of the model, not wrapped, without
its parameters. Wire: what the collectives of one step are given, times the passes of a ring.
in_backward, in_step: the most that is alive besides weights and state, until the step and in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from flora_dist.cluster.planner.wire import RING_PASSES
from flora_dist.core.layouts.dtensor import local_of
from flora_dist.trainer.chunked_loss import chunk_loss
from flora_dist.trainer.model import sum_of_losses
from tests.bench.memory import LiveBytes
from tests.bench.wire_counter import Collectives
from tests.planner.runs import BACKENDS, BLOCK, MODELS, Case, Run, build, loss_of

WARM_UP = 2
"""Steps before: state is there, and DDP has built its buckets anew."""
LOSS_CHUNK = 5
"""Tokens whose losses are computed at once, where they are in chunks."""
READINGS, PAUSE_SECONDS = 5, 0.05


def measure(case: Case) -> dict[str, int]:
    """Bytes of every category on this rank."""
    run = BACKENDS[case.backend](case)
    try:
        for step in range(WARM_UP):
            for loss, is_last in _losses(case, run, step):
                run.backward(loss, is_last)
            run.step()
        found = {
            "weights": bytes_of([*_own(run.model), *run.masters()]),
            "state": bytes_of(_state(run.optimizer)),
            **_step(case, run),
        }
        assert found["state"] >= run.optimizer.report().state_bytes  # padding of storages aside
    finally:
        run.close()
    return {**found, "activations": _activations(case)}


# ---- a step


def _step(case: Case, run: Run) -> dict[str, int]:
    """What a step holds and sends."""
    known = [*_own(run.model), *run.masters(), *_state(run.optimizer)]
    known += [*_matrices(run), *_units(run.model)]
    live, collectives = LiveBytes(known=known), Collectives()
    gradients = accumulators = 0
    with collectives, live:
        for loss, is_last in _losses(case, run, WARM_UP):
            run.backward(loss, is_last)
            del loss
            sketches = bytes_of(_sketches(run))
            gradients = max(gradients, _settled(live) - sketches)
            accumulators = sketches + bytes_of(_matrices(run))
        before_step, live.peak = live.peak, 0
        run.step()
    passes = [(RING_PASSES[sent.kind], sent) for sent in collectives.sent]
    return {
        "gradients": gradients,
        "accumulators": accumulators,
        "wire": round(sum(p * (s.ranks - 1) / s.ranks * s.bytes for p, s in passes)),
        "in_backward": before_step,
        "in_step": live.peak,
    }


def _settled(live: LiveBytes) -> int:
    """Bytes alive when gloo's threads have let go of what the last collectives were given.

    They do so a moment after a collective has ended: on a busy machine a gathered or reduced
    buffer was among the gradients once in some thirty runs.
    """
    gc.collect()
    found = live.now()
    for _ in range(READINGS):
        time.sleep(PAUSE_SECONDS)
        found = min(found, live.now())
    return found


def _losses(case: Case, run: Run, step: int) -> Iterator[tuple[Tensor, bool]]:
    """The losses of a step's micro-batches, each computed when it is asked for."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    for number in range(1, case.accumulate + 1):
        is_last = number == case.accumulate
        yield run.loss(_tokens(case, run.model, generator), is_last), is_last


def _tokens(case: Case, model: nn.Module, generator: torch.Generator) -> Tensor:
    words: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    return torch.randint(words, (case.micro_batch, case.sequence_length), generator=generator)


def _own(model: nn.Module) -> Iterator[Tensor]:
    """What is here of the parameters; ZeRO-3 keeps it beside them."""
    for parameter in model.parameters():
        yield local_of(parameter)
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def _sketches(run: Run) -> Iterator[Tensor]:
    """C of every parameter whose gradient is sketched."""
    for flow in getattr(run.optimizer.gradients, "flows", {}).values():
        if flow.accumulator.sums_ENKR is not None:
            yield flow.accumulator.sums_ENKR


def _matrices(run: Run) -> Iterator[Tensor]:
    """A of the coming step, which the last has drawn, and of the last."""
    for flow in getattr(run.optimizer.gradients, "flows", {}).values():
        yield from flow.accumulator._sketches._cache.values()


def _units(model: nn.Module) -> Iterator[Tensor]:
    """A of fused layers, which autograd keeps for backward: activations have it."""
    for module in model.modules():
        carrier = getattr(module.__dict__.get("forward"), "_carrier", None)
        if carrier is not None:
            yield carrier.unit_RB


def _state(optimizer: Flora) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, Tensor):
                    yield local_of(tensor)


def _activations(case: Case) -> int:
    """Of one forward of the model alone."""
    how = case.gradients if case.gradients == "fused" else case.precision.removesuffix("-pure")
    size = (case.micro_batch, case.sequence_length)
    kept = kept_by_autograd(MODELS / f"{case.model}.json", size, how, rank=case.rank)
    return bytes_of(kept)


def kept_by_autograd(path: Path, size: tuple[int, int], how: str, *, rank: int = 8) -> list[Tensor]:
    """What autograd keeps of a forward, without the parameters.

    ``how``: a precision, "autocast" to bfloat16, or "fused" in fp32 with sketches of that rank;
    with ", chunked" behind a precision, losses of some tokens at a time.
    """
    model = build(path)
    if how.startswith("bfloat16"):
        model = model.bfloat16()
    if how.endswith("chunked"):
        chunk_loss(model, LOSS_CHUNK)
    if how == "fused":
        flora = Flora(model.named_parameters(), lr=1e-3, rank=rank, block=BLOCK)
        flora_dist.attach(model, flora, "fused")
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        # Detached: a tensor that its own operator keeps would hold the graph for ever.
        alone = tensor.detach()
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(alone)
        return alone

    words: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    tokens = torch.randint(words, size)
    casting = torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast")
    with casting, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum_of_losses(model, tokens, tokens) if "chunked" in how else loss_of(model, tokens)
    assert loss.requires_grad  # keeps what was saved
    return kept


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the storages, each once."""
    storages = {id(s): s for s in (tensor.untyped_storage() for tensor in tensors)}
    by_place = {storage.data_ptr(): storage.nbytes() for storage in storages.values()}
    return sum(by_place.values())

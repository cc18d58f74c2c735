# SPDX-License-Identifier: Apache-2.0
"""Plans as text: what was asked, the method asked for in detail, all methods, what is assumed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from flora_dist.cluster.planner.activations import STATED
from flora_dist.cluster.planner.estimate import GIB, Estimate
from flora_dist.cluster.planner.memory import CATEGORIES
from flora_dist.cluster.planner.methods import STATES
from flora_dist.cluster.planner.model import TABLES
from flora_dist.cluster.planner.request import Request
from flora_dist.cluster.planner.search import LIMIT, SmallestCluster
from flora_dist.cluster.planner.verdict import verdict

MIB = 2**20
_WIDTH = 12


def table(
    request: Request,
    estimates: Sequence[Estimate],
    *,
    memory: int,
    micro_batch: int,
    gigabits: float,
) -> str:
    """The answer to a request; the first estimate is the one asked for.

    ``micro_batch``: the most sequences of a forward with which that one fits; 0: none.
    """
    unit, size = ("GiB", GIB) if estimates[0].total >= GIB else ("MiB", MIB)
    lines = [*_question(request), "", *_detail(estimates[0], unit, size), ""]
    lines += [*_comparison(estimates, unit, size, memory, gigabits), "", *verdict(estimates), ""]
    lines += [*_fitting(estimates, memory, micro_batch), "", *_notes(gigabits)]
    return "\n".join(lines) + "\n"


def _question(request: Request) -> Iterator[str]:
    model, batch = request.model, request.batch
    tables = sum(p.numel for p in model.parameters if p.kind in TABLES)
    yield (
        f"{model.name}: {model.numel:,} parameters, {tables:,} of them "
        f"({tables / model.numel:.1%}) in embeddings{'' if model.sizes.is_tied else ' and head'}"
    )
    checkpointing = ", checkpointing" if batch.checkpointing else ""
    if batch.loss_chunk is not None:
        checkpointing += f", losses of {batch.loss_chunk} tokens at a time"
    yield (
        f"{request.nodes} x {request.gpus} ranks, {request.backend.name}, {request.precision}; "
        f"{request.accumulate} micro-batch{'es' if request.accumulate > 1 else ''} of "
        f"{batch.sequences} x {batch.length} tokens per rank and step{checkpointing}"
    )


def _detail(estimate: Estimate, unit: str, size: int) -> Iterator[str]:
    yield f"{estimate.label}: {unit} of the rank that holds most"
    header = "".join(f"{name:>{_WIDTH + 1}}" for name in (*CATEGORIES, "total"))
    yield f"{'':20}{header}"
    totals = [held.total for held in estimate.held.values()]
    tables = [held.tables for held in estimate.held.values()]
    rest = [total - table for total, table in zip(totals, tables, strict=True)]
    for name, values in (("embeddings, head", tables), ("everything else", rest), ("", totals)):
        cells = "".join(f"{value / size:{_WIDTH + 1},.2f}" for value in (*values, sum(values)))
        yield f"{name:20}{cells}"
    if estimate.host:
        resting = f"{estimate.host / size:,.2f} {unit}"
        yield f"in the host's memory: {resting} (weights, gradients, state)"
    wire = ", ".join(f"{purpose} {sent / size:,.2f}" for purpose, sent in estimate.wire.items())
    of_them = f" ({wire})" if wire else ""
    yield f"sent per rank and step: {estimate.sent / size:,.2f} {unit}{of_them}"


def _comparison(
    estimates: Sequence[Estimate], unit: str, size: int, memory: int, gigabits: float
) -> Iterator[str]:
    width = 2 + max(len(estimate.label) for estimate in estimates)
    heads = ("weights", "gradients", "accumul.", "state", "activat.", "temporary", "total")
    columns = "".join(f"{head:>11}" for head in (*heads, "emb., head", "sent", "s on link"))
    yield f"{unit:{width}}{columns}  fits {memory / GIB:g} GiB"
    for estimate in estimates:
        values = [held.total for held in estimate.held.values()]
        values += [estimate.total, estimate.tables, estimate.sent]
        cells = "".join(f"{value / size:11,.2f}" for value in values)
        fits = "yes" if estimate.total <= memory else "no"
        yield f"{estimate.label:{width}}{cells}{estimate.seconds(gigabits):11,.3f}  {fits}"


def _fitting(estimates: Sequence[Estimate], memory: int, micro_batch: int) -> Iterator[str]:
    """What fits, in words."""
    size = f"{memory / GIB:g} GiB"
    for words, named in (
        (f"Fits {size}: ", [each.label for each in estimates if each.total <= memory]),
        (f"Does not fit {size}: ", [each.label for each in estimates if each.total > memory]),
    ):
        if named:
            yield from textwrap.wrap(words + "; ".join(named) + ".", 100, subsequent_indent="  ")
    asked = estimates[0].label
    most = f"at most {micro_batch} sequences" if micro_batch else "not one sequence"
    yield f"{asked} takes {most} in a micro-batch there."


def _notes(gigabits: float) -> Iterator[str]:
    yield "Of the rank that holds most of each. total: all at once, mostly more than a real peak."
    yield "emb., head: of the total, what embeddings and head take."
    yield f"Activations: {STATED}."
    yield "Temporary is an estimate; every other number follows exactly from shapes and settings."
    yield (
        f"Sent: by each rank around a ring, per optimizer step. s on link: at {gigabits:g} Gbit/s, "
        "nothing hidden; a ring crosses"
    )
    yield "each node's link once, hsdp's own reduce-scatters and gathers stay within a node."
    for name, formula in STATES.items():
        yield f"State of {name}: {formula}."


def search_table(request: Request, found: Sequence[SmallestCluster], *, memory: int) -> str:
    """Where each method fits first."""
    width = 2 + max(len(each.estimate.label) for each in found)
    lines = [
        "",
        f"Fewest ranks that hold it in {memory / GIB:g} GiB each, up to {request.gpus} a node and "
        f"{LIMIT} in all",
        f"{'':{width}}{'nodes x ranks':>14}{'GiB':>11}",
    ]
    for each in found:
        where = f"{each.nodes} x {each.gpus}" if each.fits else "none"
        lines.append(f"{each.estimate.label:{width}}{where:>14}{each.estimate.total / GIB:11,.2f}")
    if not all(each.fits for each in found):
        lines.append("none: the GiB are those of the largest cluster tried.")
    return "\n".join(lines) + "\n"

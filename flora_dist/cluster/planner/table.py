# SPDX-License-Identifier: Apache-2.0
"""Plans as text: what was asked, the method asked for in detail, all methods, what is assumed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from flora_dist.cluster.planner.activations import STATED
from flora_dist.cluster.planner.memory import CATEGORIES
from flora_dist.cluster.planner.methods import STATES
from flora_dist.cluster.planner.model import TABLES
from flora_dist.cluster.planner.plan import GIB, Plan
from flora_dist.cluster.planner.request import Request
from flora_dist.cluster.planner.search import LIMIT, Found
from flora_dist.cluster.planner.verdict import verdict

MIB = 2**20
_WIDTH = 12


def table(
    request: Request, plans: Sequence[Plan], *, memory: int, micro_batch: int, gigabits: float
) -> str:
    """The answer to a request; the first plan is the one asked for.

    ``micro_batch``: the most sequences of a forward with which that one fits; 0: none.
    """
    unit, size = ("GiB", GIB) if plans[0].total >= GIB else ("MiB", MIB)
    lines = [*_question(request), "", *_detail(plans[0], unit, size), ""]
    lines += [*_comparison(plans, unit, size, memory, gigabits), "", *verdict(plans), ""]
    lines += [*_fitting(plans, memory, micro_batch), "", *_notes(gigabits)]
    return "\n".join(lines) + "\n"


def _question(request: Request) -> Iterator[str]:
    model, batch = request.model, request.batch
    tables = sum(p.numel for p in model.parameters if p.kind in TABLES)
    yield (
        f"{model.name}: {model.numel:,} parameters, {tables:,} of them "
        f"({tables / model.numel:.1%}) in embeddings{'' if model.sizes.is_tied else ' and head'}"
    )
    checkpointing = ", checkpointing" if batch.checkpointing else ""
    yield (
        f"{request.nodes} x {request.gpus} ranks, {request.backend.name}, {request.precision}; "
        f"{request.accumulate} micro-batch{'es' if request.accumulate > 1 else ''} of "
        f"{batch.sequences} x {batch.length} tokens per rank and step{checkpointing}"
    )


def _detail(plan: Plan, unit: str, size: int) -> Iterator[str]:
    yield f"{plan.label}: {unit} of the rank that holds most"
    header = "".join(f"{name:>{_WIDTH + 1}}" for name in (*CATEGORIES, "total"))
    yield f"{'':20}{header}"
    totals = [held.total for held in plan.held.values()]
    tables = [held.tables for held in plan.held.values()]
    rest = [total - table for total, table in zip(totals, tables, strict=True)]
    for name, values in (("embeddings, head", tables), ("everything else", rest), ("", totals)):
        cells = "".join(f"{value / size:{_WIDTH + 1},.2f}" for value in (*values, sum(values)))
        yield f"{name:20}{cells}"
    wire = ", ".join(f"{purpose} {sent / size:,.2f}" for purpose, sent in plan.wire.items())
    yield f"sent per rank and step: {plan.sent / size:,.2f} {unit}{f' ({wire})' if wire else ''}"


def _comparison(
    plans: Sequence[Plan], unit: str, size: int, memory: int, gigabits: float
) -> Iterator[str]:
    width = 2 + max(len(plan.label) for plan in plans)
    heads = ("weights", "gradients", "accumul.", "state", "activat.", "temporary", "total")
    columns = "".join(f"{head:>11}" for head in (*heads, "emb., head", "sent", "s on link"))
    yield f"{unit:{width}}{columns}  fits {memory / GIB:g} GiB"
    for plan in plans:
        values = [held.total for held in plan.held.values()]
        values += [plan.total, plan.tables, plan.sent]
        cells = "".join(f"{value / size:11,.2f}" for value in values)
        fits = "yes" if plan.total <= memory else "no"
        yield f"{plan.label:{width}}{cells}{plan.seconds(gigabits):11,.3f}  {fits}"


def _fitting(plans: Sequence[Plan], memory: int, micro_batch: int) -> Iterator[str]:
    """What fits, in words."""
    size = f"{memory / GIB:g} GiB"
    for words, named in (
        (f"Fits {size}: ", [plan.label for plan in plans if plan.total <= memory]),
        (f"Does not fit {size}: ", [plan.label for plan in plans if plan.total > memory]),
    ):
        if named:
            yield from textwrap.wrap(words + "; ".join(named) + ".", 100, subsequent_indent="  ")
    asked = plans[0].label
    most = f"at most {micro_batch} sequences" if micro_batch else "not one sequence"
    yield f"{asked} takes {most} in a micro-batch there."


def _notes(gigabits: float) -> Iterator[str]:
    yield "Of the rank that holds most of each. total: all at once, which is more than a real peak."
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


def search_table(request: Request, found: Sequence[Found], *, memory: int) -> str:
    """Where each method fits first."""
    width = 2 + max(len(each.plan.label) for each in found)
    lines = [
        "",
        f"Fewest ranks that hold it in {memory / GIB:g} GiB each, up to {request.gpus} a node and "
        f"{LIMIT} in all",
        f"{'':{width}}{'nodes x ranks':>14}{'GiB':>11}",
    ]
    for each in found:
        where = f"{each.nodes} x {each.gpus}" if each.fits else "none"
        lines.append(f"{each.plan.label:{width}}{where:>14}{each.plan.total / GIB:11,.2f}")
    if not all(each.fits for each in found):
        lines.append("none: the GiB are those of the largest cluster tried.")
    return "\n".join(lines) + "\n"

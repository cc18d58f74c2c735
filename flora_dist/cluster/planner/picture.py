# SPDX-License-Identifier: Apache-2.0
"""A stacked bar of bytes per rank for each method, with the memory of a rank as a line."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flora_dist.cluster.planner.estimate import GIB, Estimate
from flora_dist.cluster.planner.memory import CATEGORIES
from flora_dist.cluster.planner.request import Request

# Told apart by people who do not see red and green alike (Okabe & Ito).
_COLOURS = ("#0072B2", "#D55E00", "#F0E442", "#009E73", "#56B4E9", "#BBBBBB")


def check_picture(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        ValueError: no .png, no such folder, or no matplotlib.
    """
    if path.suffix != ".png":
        raise ValueError(f"--picture must name a .png file; got {str(path)!r}. End it in .png.")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"--picture must be in a folder that exists; got {str(path)!r}. Make the folder."
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--picture needs matplotlib, which is not installed. pip install 'flora-dist[train]', "
            "or leave the option out."
        ) from error


def draw(request: Request, estimates: Sequence[Estimate], *, memory: int, path: Path) -> None:
    """Write the picture; the file is whole or not there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.32 * len(estimates)), layout="constrained")
    axes = figure.subplots()
    labels = [each.label for each in estimates]
    starts = [0.0] * len(estimates)
    for category, colour in zip(CATEGORIES, _COLOURS, strict=True):
        sizes = [each.held[category].total / GIB for each in estimates]
        axes.barh(labels, sizes, left=starts, color=colour, label=category, height=0.7)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for place, end in enumerate(starts):
        axes.text(end, place, f" {end:,.1f}", va="center", fontsize=8)
    axes.axvline(memory / GIB, color="black", linestyle="--", label=f"{memory / GIB:g} GiB")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(*starts, memory / GIB))
    axes.set_xlabel("GiB per rank, all at once")
    axes.set_title(
        f"{request.model.name}, {request.nodes} x {request.gpus} ranks, {request.backend.name}, "
        f"{request.precision}, micro-batch {request.micro_batch} x {request.sequence_length}",
        fontsize=10,
    )
    # Of the figure: below the axes alone it would be cut where labels are long.
    figure.legend(fontsize=8, ncols=len(CATEGORIES) + 1, loc="outside lower center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    _write_whole(path, buffer.getvalue())


def _write_whole(path: Path, content: bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise

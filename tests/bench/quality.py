# SPDX-License-Identifier: Apache-2.0
"""Which optimizer learns most from the same tokens: one table, results.json, pictures.

    python -m tests.bench.quality                       about 75 minutes of 2 cores
    python -m tests.bench.quality --quick               about 3 minutes
    python -m tests.bench.quality --table compressed    about 45 minutes of a shared core
    python -m tests.bench.quality --table sceptic --size small    every rule tuned as AdamW is
    python -m tests.bench.quality --table weights       weights in bfloat16 alone

Every row gets the same tokens and learning rates (`quality_plan.py`); the one with the lowest
validation loss counts, and is run again with a second seed. Finished runs are kept in runs.jsonl at
once: `--resume` goes on after an interruption. The sceptic's table (`quality_sceptic.py`) has
sizes of its own, and tunes more than lr.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rich.table
import torch
from rich.console import Console

from flora_dist.trainer.config_data import STDLIB
from tests.bench import (
    quality_compressed,
    quality_plan,
    quality_sceptic,
    quality_search,
    quality_table,
    quality_weights,
)
from tests.bench.quality_bytes import draw_bytes
from tests.bench.quality_peers import package_rows
from tests.bench.quality_plan import (
    Row,
    Run,
    Size,
    all_rows,
    expected_runs,
    next_runs,
    resized,
    rows_named,
)
from tests.bench.quality_ratios import draw_compressed
from tests.bench.quality_run import Bench, Settings, bench_of, start_worker, train_one


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that are compared with one another."""

    rows: Sequence[Row]
    size: Size
    quick_rows: Sequence[str]
    quick_size: Size
    draw: Callable[[Sequence[quality_table.Line], Path, str], None]
    """Its pictures, into a folder, with a title."""
    plan: Callable[[Sequence[Row], Mapping[Run, float], Size], list[Run]] = next_runs
    """Runs that are missing and can be told already."""
    expected: Callable[[Sequence[Row], Size], int] = expected_runs
    """How many runs to expect."""
    lines: Callable[
        [Sequence[Row], Mapping[Run, dict[str, Any]], Mapping[Run, float], Size],
        list[quality_table.Line],
    ] = quality_table.lines
    show: Callable[[Sequence[quality_table.Line], str], rich.table.Table] = quality_table.table
    """The lines for a terminal, with a title."""


TABLES = {
    "optimizers": Table(
        rows=(*all_rows(), *quality_sceptic.tile_rows(), *package_rows()),
        size=quality_plan.FULL,
        quick_rows=quality_plan.QUICK_ROWS,
        quick_size=quality_plan.QUICK,
        draw=quality_table.draw_optimizers,
    ),
    "compressed": Table(
        rows=quality_compressed.compressed_rows(),
        size=quality_compressed.FULL,
        quick_rows=quality_compressed.QUICK_ROWS,
        quick_size=quality_compressed.QUICK,
        draw=draw_compressed,
    ),
    "accumulated": Table(
        rows=quality_compressed.many_rows(),
        size=quality_compressed.MANY_FULL,
        quick_rows=quality_compressed.MANY_QUICK_ROWS,
        quick_size=quality_compressed.MANY_QUICK,
        draw=draw_bytes,
    ),
    "sceptic": Table(
        rows=quality_sceptic.sceptic_rows(),
        size=quality_sceptic.FULL,
        quick_rows=[row.name for row in quality_sceptic.sceptic_rows() if row.name == row.family],
        quick_size=quality_sceptic.QUICK,
        draw=quality_sceptic.draw_nothing,
        plan=quality_search.next_rounds,
        expected=quality_search.expected_rounds,
        lines=quality_sceptic.sceptic_lines,
        show=quality_sceptic.sceptic_table,
    ),
    "weights": Table(
        rows=quality_weights.weights_rows(),
        size=quality_weights.FULL,
        quick_rows=quality_weights.QUICK_ROWS,
        quick_size=quality_weights.QUICK,
        draw=quality_sceptic.draw_nothing,
    ),
}


MODELS = {
    "small": ("configs/model/llama_9m.json", 2),
    "middle": ("configs/model/llama_9m.json", 8),
    "large": ("configs/model/llama_26m_bytes.json", 2),
}
"""Model and layers by size: 0.5, 1.7 and 6.6 million parameters over bytes."""


class Store:
    """Finished runs, in memory and in runs.jsonl, whose first line says what they share."""

    def __init__(self, folder: Path, shared: Mapping[str, Any], *, resume: bool) -> None:
        """Open the folder.

        Raises:
            ValueError: it holds runs and none were expected, or runs of other settings.
        """
        self._path = folder / "runs.jsonl"
        self.records: dict[Run, dict[str, Any]] = {}
        lines: list[dict[str, Any]] = [json.loads(json.dumps(shared))]
        if self._path.exists():
            lines = self._earlier(lines[0], resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        # Whole again, should the last line have been torn.
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        for line in lines[1:]:
            self._keep(line)

    def _earlier(self, shared: dict[str, Any], *, resume: bool) -> list[dict[str, Any]]:
        if not resume:
            raise ValueError(
                f"a bench must not overwrite another; {str(self._path)!r} exists. Pass --resume to "
                "go on with it, or another --out."
            )
        lines = []
        for text in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not text.endswith("\n"):  # interrupted while it was written
                break
            lines.append(json.loads(text))
        if not lines:
            return [shared]
        differing = [key for key in shared if lines[0].get(key) != shared[key]]
        if differing:
            raise ValueError(
                f"runs of one table must share their settings; {str(self._path)!r} has another "
                f"{', '.join(differing)}. Give the same arguments, or another --out."
            )
        return lines

    def _keep(self, record: dict[str, Any]) -> None:
        self.records[Run(record["row"], record["exponent"], record["seed"])] = record

    def add(self, record: dict[str, Any]) -> None:
        """Keep a finished run, on disk before anything else happens."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._keep(record)

    @property
    def losses(self) -> dict[Run, float]:
        """Final validation losses; a run that diverged has infinity."""
        found = {run: record["validation_loss"] for run, record in self.records.items()}
        return {run: math.inf if loss is None else loss for run, loss in found.items()}


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it: nobody ever sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run_all(
    table: Table,
    pool: Executor,
    rows: Sequence[Row],
    settings: Settings,
    store: Store,
    *,
    workers: int,
    console: Console,
) -> None:
    """Train whatever is missing, `workers` runs at a time."""
    by_name = {row.name: row for row in rows}
    began, before = time.perf_counter(), len(store.records)
    total = table.expected(rows, settings.size)
    pending: dict[Future[dict[str, Any]], Run] = {}
    while True:
        for run in table.plan(rows, store.losses, settings.size):
            if len(pending) < workers and run not in pending.values():
                pending[pool.submit(train_one, settings, by_name[run.row], run)] = run
        if not pending:
            return
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            del pending[future]
            record = future.result()
            store.add(record)
            done = len(store.records)
            per_run = (time.perf_counter() - began) / (done - before)
            loss = record["validation_loss"]
            shown = "diverged" if loss is None else f"{loss:.4f}"
            console.print(
                f"{done:4d} of about {total}, {max(0, total - done) * per_run / 60:.0f} min left: "
                f"{record['row']}, lr {record['lr']:.3g}, seed {record['seed']}: {shown}",
                soft_wrap=True,
                highlight=False,
            )


def report(
    table: Table,
    rows: Sequence[Row],
    settings: Settings,
    store: Store,
    folder: Path,
    console: Console,
) -> None:
    """results.json, the pictures and the printed table, of the rows that are complete."""
    bench = bench_of(settings)
    found = table.lines(rows, store.records, store.losses, settings.size)
    about = facts(settings, bench)
    text = json.dumps({**about, "rows": found}, indent=1, allow_nan=False)
    write_whole(folder / "results.json", text + "\n")
    title = f"{about['parameters']:,} parameters, {about['tokens']:,} tokens per run"
    table.draw(found, folder, title)
    console.print(table.show(found, title))
    console.print(f"{about['machine']}, torch {about['torch']}; written to {folder}")


def facts(settings: Settings, bench: Bench) -> dict[str, Any]:
    """Where, when and on what the table was made."""
    size = settings.size
    return {
        "command": shlex.join(["python", "-m", "tests.bench.quality", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(bench.world.device),
        "torch": torch.__version__,
        "parameters": bench.parameters,
        "corpus": bench.corpus.fingerprint,
        "tokens": size.steps * size.global_batch * size.sequence_length,
        "settings": asdict(settings),
    }


def machine(device: torch.device) -> str:
    """What computed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {kind}, {os.cpu_count()} cores"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.quality", description=__doc__)
    parser.add_argument("--table", default="optimizers", choices=tuple(TABLES))
    parser.add_argument("--quick", action="store_true", help="few rows, short runs")
    parser.add_argument("--data", default=STDLIB, help="python-stdlib, a file or a folder")
    parser.add_argument("--size", choices=tuple(MODELS), help="of the model, with its layers")
    parser.add_argument("--model", help="a transformers config, in place of that of --size")
    parser.add_argument("--out", default="runs/quality", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on in --out")
    parser.add_argument("--rows", help="names of rows, separated by semicolons")
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--layers", type=int, help="layers of the model")
    parser.add_argument("--global-batch", type=int, help="sequences per step")
    parser.add_argument("--sequence-length", type=int, help="tokens per sequence")
    parser.add_argument("--grid", help="exponents of the learning rates, separated by commas")
    parser.add_argument("--seeds", type=int, help="seeds of the best learning rate")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code, 130 after Ctrl-C."""
    args = arguments(argv)
    table = TABLES[args.table]
    size = resized(
        table.quick_size if args.quick else table.size,
        steps=args.steps,
        layers=args.layers,
        global_batch=args.global_batch,
        sequence_length=args.sequence_length,
        seeds=args.seeds,
    )
    if args.grid is not None:
        size = replace(size, grid=tuple(int(exponent) for exponent in args.grid.split(",")))
    model, layers = MODELS[args.size or "small"]
    if args.layers is None and (args.size is not None or size.layers is None):
        size = replace(size, layers=layers)
    settings = Settings(model=args.model or model, data=args.data, size=size, device=args.device)
    rows = rows_named(table.quick_rows, table.rows) if args.quick else table.rows
    if args.rows is not None:
        rows = rows_named([name.strip() for name in args.rows.split(";")], table.rows)
    bench = bench_of(settings)
    shared = {"settings": asdict(settings), "corpus": bench.corpus.fingerprint}
    store = Store(args.out, shared, resume=args.resume)
    console = Console(width=120)  # also into a log
    context = get_context("spawn")
    code = 0
    try:
        with ProcessPoolExecutor(args.workers, context, initializer=start_worker) as pool:
            run_all(table, pool, rows, settings, store, workers=args.workers, console=console)
    except KeyboardInterrupt:
        console.print(f"interrupted after {len(store.records)} runs; --resume goes on")
        code = 130
    report(table, rows, settings, store, args.out, console)
    return code


if __name__ == "__main__":
    sys.exit(main())

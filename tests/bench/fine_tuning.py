# SPDX-License-Identifier: Apache-2.0
"""A small network that has learned Python's sources goes on with English: who learns most.

    python -m tests.bench.fine_tuning --out runs/fine_tuning      some 6 minutes of a core

First AdamW trains the network of `tests.bench.quality` on the standard library less the text that
follows. Then each row goes on from those weights with the text of Python's own help
(pydoc_data.topics), in a quarter of the steps, at learning rates a factor of 2 apart until the best
lies between two worse ones, and at the best with a second seed of the order of sequences. Adapters
have the largest rank whose AdamW keeps no more bytes than Flora's default. Finished runs are kept
in runs.jsonl: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_dist.trainer.arrange import with_adapters
from flora_dist.trainer.backend import spread
from flora_dist.trainer.config_data import LoraConfig
from flora_dist.trainer.documents import standard_library
from flora_dist.trainer.evaluate import validation_loss
from flora_dist.trainer.model import build_model
from tests.bench.lora import bytes_of_default, largest_rank
from tests.bench.quality_plan import ADAMW, FULL, Row, Run, Size, next_runs
from tests.bench.quality_run import Settings, bench_of, config_of_run, train_model
from tests.bench.quality_sceptic import TILES

MODEL = "configs/model/llama_9m.json"
SIZE = replace(FULL, steps=200, evaluations=4, grid=(-2, -1, 0), extensions=4, seeds=2)
KEPT: dict[str, Any] = {"weight_decay": 0.0}
FROM_ADAMW = Row(name=ADAMW, factor="from", optimizer="adamw", options=KEPT)
DEFAULT = "Flora (default)"
ADAPTERS = "LoRA (peft), AdamW"
ROWS = (
    FROM_ADAMW,
    Row(name=DEFAULT, factor="rule", optimizer="flora", options=KEPT),
    Row(name="Flora, 4 bits", factor="rule", optimizer="flora", options=KEPT | {"state_bits": 4}),
    Row(
        name="Flora, rank 8, gain 2",
        factor="rule",
        optimizer="flora",
        options=KEPT | {"rank": 8, "blend_gain": 2.0},
    ),
    Row(name="Flora, none", factor="rule", optimizer="flora", options=KEPT | {"momentum": "none"}),
    Row(name="Flora, tiles", factor="rule", optimizer="flora", options={**KEPT, **TILES}),
    Row(name=ADAPTERS, factor="adapters", optimizer="adamw", options=KEPT),
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where everything lies, and what the runs share."""

    folder: Path
    settings: Settings

    def start(self, seed: int) -> nn.Module:
        """The network as it was before it met the new text."""
        row = FROM_ADAMW
        config = config_of_run(self.settings, row, Run(row=row.name, exponent=0, seed=seed))
        model = build_model(config.model, bench_of(self.settings).network, seed=0)
        model.load_state_dict(torch.load(self.folder / "start.pt", weights_only=True))
        return model

    def before(self) -> float:
        """Validation loss of the new text that nothing was learned of."""
        run = Run(row=FROM_ADAMW.name, exponent=0, seed=0)
        config, own = config_of_run(self.settings, FROM_ADAMW, run), bench_of(self.settings)
        return validation_loss(
            spread(self.start(0), config, own.world),
            own.corpus.validation,
            own.world,
            sequences=config.evaluation.sequences,
            micro_batch=config.train.micro_batch,
        )


def texts(folder: Path) -> tuple[Path, Path]:
    """What the network learns first and then, each one file."""
    help_file = Path(pydoc_data.topics.__file__).resolve()
    code, english = folder / "code.txt", folder / "english.txt"
    sources = (path for path in standard_library() if path.resolve() != help_file)
    code.write_text(
        "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sources),
        encoding="utf-8",
    )
    english.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    return code, english


def trained_first(folder: Path, code: Path, size: Size) -> None:
    """Write the weights that all rows start from."""
    settings = Settings(model=MODEL, data=str(code), size=size)
    run = Run(row=FROM_ADAMW.name, exponent=0, seed=0)
    config = config_of_run(settings, FROM_ADAMW, run)
    model = build_model(config.model, bench_of(settings).network, seed=0)
    told = train_model(settings, FROM_ADAMW, run, model)
    torch.save(model.state_dict(), folder / "start.pt")
    print(f"code: validation loss {told['validation_loss']:.4f}", flush=True)


def gone_on(bench: Bench, row: Row, run: Run, rank: int) -> dict[str, Any]:
    """One run on the new text."""
    model = bench.start(run.seed)
    if row.name == ADAPTERS:
        model = with_adapters(model, LoraConfig(rank=rank))
    return train_model(bench.settings, row, run, model)


def run_all(
    rows: tuple[Row, ...], size: Size, kept: Path, once: Callable[[Row, Run], dict[str, Any]]
) -> dict[Run, dict[str, Any]]:
    """Whatever is missing, one run after the other."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    records = {Run(r["row"], r["exponent"], r["seed"]): r for r in map(json.loads, lines)}
    by_name = {row.name: row for row in rows}
    while missing := next_runs(
        rows, {run: record["validation_loss"] for run, record in records.items()}, size
    ):
        run = missing[0]
        records[run] = once(by_name[run.row], run)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[run]) + "\n")
        loss = records[run]["validation_loss"]
        print(f"{run.row}, lr {records[run]['lr']:.3g}, seed {run.seed}: {loss:.4f}", flush=True)
    return records


def main() -> int:
    """Print the table, best first."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.fine_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="runs/fine_tuning", type=Path)
    parser.add_argument("--steps", type=int, default=SIZE.steps, help="on the new text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    code, english = texts(given.out)
    if not (given.out / "start.pt").exists():
        trained_first(given.out, code, replace(FULL, steps=4 * given.steps))
    size = replace(SIZE, steps=given.steps)
    bench = Bench(folder=given.out, settings=Settings(model=MODEL, data=str(english), size=size))
    print(f"before: validation loss {bench.before():.4f}", flush=True)
    rank = largest_rank(bytes_of_default())
    records = run_all(
        ROWS, size, given.out / "runs.jsonl", lambda row, run: gone_on(bench, row, run, rank)
    )
    for row in ROWS:
        own = {run: record for run, record in records.items() if run.row == row.name}
        best = min((r for r in own if r.seed == 0), key=lambda r: own[r]["validation_loss"])
        seeds = [own[run]["validation_loss"] for run in own if run.exponent == best.exponent]
        print(
            f"| {row.name} | {own[best]['state_bytes']:,} | {own[best]['lr']:.3g} | "
            f"{', '.join(f'{loss:.4f}' for loss in seeds)} | {statistics.fmean(seeds):.4f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

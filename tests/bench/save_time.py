# SPDX-License-Identifier: Apache-2.0
"""Time and bytes of a checkpoint of llama-130m: Flora's state beside AdamW's.

    python -m tests.bench.save_time

One process. Saves are interleaved; each writes, syncs, hashes and renames the whole checkpoint.
"until training goes on": of a save in the background, which first copies. "write alone": the same
bytes written to one file and synced, to tell the disk from us.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from flora_dist import Flora, checkpoint
from flora_dist.checkpoint.folder import read_manifest

CONFIG = Path(__file__).parents[2] / "configs" / "model" / "llama_130m.json"
ROUNDS = 3


@dataclass(kw_only=True)
class Row:
    """What one optimizer's checkpoints cost."""

    optimizer: torch.optim.Optimizer
    state_bytes: int = 0
    file_bytes: int = 0
    whole: list[float] = field(default_factory=list)
    held_up: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)


def main() -> None:
    """Prints one line per optimizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG))
    named = list(model.named_parameters())
    torch.manual_seed(0)
    for _, parameter in named:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    rows = {
        "AdamW": Row(optimizer=torch.optim.AdamW(model.parameters())),
        "Flora, ratio 16, float32": Row(
            optimizer=Flora(named, rank=4, block=64, state_dtype="float32")
        ),
        "Flora, ratio 16, bfloat16": Row(
            optimizer=Flora(named, rank=4, block=64, state_dtype="bfloat16")
        ),
    }
    for row in rows.values():
        row.optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for row in rows.values():
                _measure(model, row, Path(folder))
        disk = _write_alone(Path(folder) / "plain", sum(p.numel() * 4 for _, p in named))
    print(f"llama-130m, {sum(p.numel() for _, p in named):,} parameters, {ROUNDS} rounds, medians")
    print(
        f"{'optimizer':28} {'state bytes':>14} {'checkpoint':>14} {'save s':>7} "
        f"{'until training goes on s':>25} {'load s':>7}"
    )
    for name, row in rows.items():
        print(
            f"{name:28} {row.state_bytes:14,} {row.file_bytes:14,} "
            f"{statistics.median(row.whole):7.2f} {statistics.median(row.held_up):25.2f} "
            f"{statistics.median(row.loaded):7.2f}"
        )
    print(f"write alone, weights: {disk:.2f} s")


def _measure(model: nn.Module, row: Row, folder: Path) -> None:
    path = folder / "checkpoints"
    row.whole.append(_timed(lambda: checkpoint.save(path, model, row.optimizer, step=1)))
    row.loaded.append(_timed(lambda: checkpoint.load(path, model, row.optimizer)))
    saved = read_manifest(path / "step-00000001")
    row.file_bytes = sum(facts.bytes for facts in saved.files.values())
    row.state_bytes = sum(
        torch.Size(facts.shape).numel() * getattr(torch, facts.dtype).itemsize
        for key, facts in saved.tensors.items()
        if key.startswith("optimizer.")
    )
    pending: list[checkpoint.Saving] = []
    row.held_up.append(
        _timed(lambda: pending.append(checkpoint.save_async(path, model, row.optimizer, step=2)))
    )
    pending[0].wait()
    shutil.rmtree(path)


def _write_alone(path: Path, num_bytes: int) -> float:
    data = os.urandom(1 << 20)

    def write() -> None:
        with path.open("wb") as file:
            for _ in range(num_bytes >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return statistics.median([_timed(write) for _ in range(ROUNDS)])


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What ``launch/gpu.sh`` runs, slice by slice; each prints one JSON object on its last line.

    python -m tests.gpu.slices --slice step [--rehearse]
    python -m tests.gpu.slices --slice 60m --runs FILE [--rehearse]

``--rehearse``: toy sizes on the CPU, kernels in Triton's interpreter; its times mean nothing.
``--runs``: where a slice of many training runs keeps those that have ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from flora_dist.kernels.gpu.graph import record_graph
from tests.gpu import benches, quality, training
from tests.kernels.gpu.bits import wrong_bits
from tests.kernels.gpu.cuda_bits import other_bits
from tests.kernels.gpu.cut_runs import wrong_cuts
from tests.kernels.gpu.drawn_runs import wrong_steps
from tests.kernels.gpu.record_runs import wrong_records
from tests.kernels.gpu.runs import (
    DEVICE,
    GRAPHED,
    again,
    by_graph,
    difference,
    small_case_of,
    synchronisations,
    unnoticed,
)

Found = dict[str, Any]


def bits(is_rehearsal: bool) -> Found:
    """Random bits, sketches and rounding, beside the CPU's."""
    del is_rehearsal
    return {"faults": [*wrong_bits(DEVICE), *other_bits(DEVICE)]}


def runs(is_rehearsal: bool) -> Found:
    """Random runs by kernels and by torch's operators, of what is whole here and what is cut."""
    # Each case has kernels of its own to be compiled, some ten of them at a second each.
    cases = range(3 if is_rehearsal else 10)
    parted = {seed: what for seed in cases if (what := difference(small_case_of(seed)))}
    cut = range(1 if is_rehearsal else 4)
    missed = [] if is_rehearsal else unnoticed()
    faults = [f"seed {seed}: {what}" for seed, what in parted.items()]
    faults += [*wrong_cuts(cut), *(f"unnoticed: {each}" for each in missed)]
    return {"cases": len(cases) + len(cut), "faults": faults}


def records(is_rehearsal: bool) -> Found:
    """Gradients in few bits: added to records, and stepped on."""
    cases = range(1 if is_rehearsal else 8)
    return {
        "cases": 2 * len(cases),
        "faults": [*wrong_records(DEVICE, cases), *wrong_steps(DEVICE, cases)],
    }


def graph(is_rehearsal: bool) -> Found:
    """A step in a CUDA graph beside the eager one, and what waits for the device."""
    parted = by_graph(GRAPHED, again if is_rehearsal else record_graph)
    faults = [f"by graph: {parted}"] if parted else []
    return {"faults": [*faults, *([] if is_rehearsal else synchronisations())]}


def marked(is_rehearsal: bool) -> Found:
    """Tests marked ``gpu``, where there is a pytest."""
    if importlib.util.find_spec("pytest") is None:
        return {"faults": [], "left out": "pytest is not installed"}
    where = ["tests/sketch", "tests/kernels/gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *where]
    if is_rehearsal:
        command.append("--collect-only")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return {"faults": lines[-20:] if done.returncode else [], "said": lines[-1:]}


SLICES: Mapping[str, Callable[[bool], Found]] = {
    "bits": bits,
    "runs": runs,
    "records": records,
    "graph": graph,
    "marked": marked,
    "step": benches.step,
    "sketch": benches.sketch,
    "training": training.training,
}


def slices_of(kept: Path) -> Mapping[str, Callable[[bool], Found]]:
    """All of them; ``kept`` is the file of those that have many runs."""
    return {**SLICES, **{name: partial(quality.quality, name, kept=kept) for name in quality.PLANS}}


def main() -> int:
    """Run one; the exit code is 1 where it has found a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slice", required=True, choices=(*SLICES, *quality.PLANS))
    parser.add_argument("--runs", type=Path, default=Path("runs.jsonl"))
    parser.add_argument("--rehearse", action="store_true")
    parsed = parser.parse_args()
    if not parsed.rehearse and DEVICE != "cuda":
        sys.stderr.write(
            "this needs a CUDA device; torch sees none. Pass --rehearse for the CPU.\n"
        )
        return 2
    start = time.perf_counter()
    found = slices_of(parsed.runs)[parsed.slice](parsed.rehearse)
    is_gpu = DEVICE == "cuda"
    result = {
        "slice": parsed.slice,
        "rehearsal": parsed.rehearse,
        "device": torch.cuda.get_device_name() if is_gpu else "CPU, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        **found,
    }
    print(json.dumps(result))
    return int(bool(result["faults"]))


if __name__ == "__main__":
    sys.exit(main())

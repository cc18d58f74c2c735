# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed loses of an optimizer on NVMe when a checkpoint is loaded; no Flora in it.

    python -m tests.zero.nvme_fault

Why flora_dist refuses ``offload_optimizer: {device: nvme}``. One process, ZeRO-3, torch's AdamW on
two matrices and a bias in groups of their own: three steps, ``save_checkpoint``, a new engine,
``load_checkpoint``, one more step in both. With offload to the CPU both engines then hold the same
weights, bit for bit. With NVMe, ``load_checkpoint`` copies swap files back and skips the rest of
the checkpoint: the fp32 weights that ``safe_get_full_fp32_param`` finds are not those saved, AdamW
has no state, and begins again at its first step.

Needs libaio (apt: libaio-dev), and compiles DeepSpeed's async_io once, for minutes. The exit code
is 0 where NVMe loses state and the CPU does not, and 1 where this no longer holds: then the refusal
in flora_dist/frameworks/deepspeed/config.py has lost its reason.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Where the tests keep what DeepSpeed compiles.
import tests.conftest  # noqa: F401  sets TORCH_EXTENSIONS_DIR
from tests.harness.launched import free_port

WIDTH, STEPS = 600, 3


def engine_of(device: str, folder: Path) -> Any:
    """A new engine, the same every time."""
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    offload = {"device": device, "nvme_path": str(folder / "swap"), "buffer_count": 6}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "offload_optimizer": offload},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config
    )
    return engine


def step(engine: Any, count: int) -> None:
    """A training step on inputs that follow from ``count``."""
    draw = torch.Generator().manual_seed(count)
    loss = engine(torch.randn(4, WIDTH, generator=draw)).square().mean()
    engine.backward(loss)
    engine.step()


def state_of(engine: Any) -> list[dict[str, float]]:
    """Of each flat partition: its steps, and the norm of its first moment where that is here."""
    found = []
    for state in engine.optimizer.optimizer.state.values():
        moment: Tensor = state["exp_avg"]
        norm = float(moment.norm()) if moment.numel() else float("nan")  # on disk
        found.append({"steps": float(state["step"]), "first moment": norm})
    return found


def weights_of(engine: Any) -> Tensor:
    """All of them, flat."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = [safe_get_full_fp32_param(each).flatten() for each in engine.module.parameters()]
    return torch.cat(whole)


def resumed(device: str, folder: Path) -> float:
    """How far a resumed engine is from the one that went on, after a step, over what that moved."""
    (folder / "swap").mkdir()
    engine = engine_of(device, folder)
    for count in range(STEPS):
        step(engine, count)
    engine.save_checkpoint(str(folder / "kept"), tag="three")
    saved, before = state_of(engine), weights_of(engine)
    step(engine, STEPS)
    after = weights_of(engine)
    engine.destroy()
    again = engine_of(device, folder)
    again.load_checkpoint(str(folder / "kept"), tag="three")
    loaded, there = state_of(again), weights_of(again)
    step(again, STEPS)
    distance = float((weights_of(again) - after).norm() / (after - before).norm())
    again.destroy()
    for kind, states in (("saved", saved), ("loaded", loaded)):
        shown = [f"{one['steps']:g} steps, {one['first moment']:.2e}" for one in states]
        print(f"{device}, {kind}: {'; '.join(shown) or 'no state'}")
    print(f"{device}: weights as loaded, {float((there - before).norm()):.1e} from those saved")
    print(f"{device}: after one more step, {distance:.1e} of that step apart")
    return distance


def main() -> int:
    """Print both."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    distances = {}
    for device in ("cpu", "nvme"):
        with tempfile.TemporaryDirectory() as folder:
            distances[device] = resumed(device, Path(folder))
    return int(not distances["cpu"] < 1e-5 < distances["nvme"])


if __name__ == "__main__":
    sys.exit(main())

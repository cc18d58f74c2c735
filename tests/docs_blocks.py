# SPDX-License-Identifier: Apache-2.0
"""Runs the Python blocks of README and docs, each in names of its own, in one process.

    python -m tests.docs_blocks

The one that is for two processes runs in two forks of it, which need no start of their own.

The names are those that a block takes for granted: a small model, a batch, an optimizer over it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/hosts/loops.md",
    ROOT / "docs/hosts/deepspeed.md",
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ON_TWO_PROCESSES = "init_device_mesh"


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """The blocks of one language with the page and number of each."""
    for page in PAGES:
        found = FENCE.findall(page.read_text(encoding="utf-8"))
        codes = [code for name, code in found if name == language]
        for number, code in enumerate(codes, start=1):
            yield f"{page.relative_to(ROOT)}, block {number} of {language}", code


def small_model() -> Any:
    """A llama of one layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def names() -> dict[str, Any]:
    """What a block finds: fresh for each, since blocks train and wrap what they are given."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import flora_dist

    model = small_model()
    row = torch.arange(16)
    batch = {"input_ids": row[None], "labels": row[None]}
    quiet = {"report_to": [], "use_cpu": True, "max_steps": 2, "disable_tqdm": True}

    def arguments(folder: str, **more: Any) -> TrainingArguments:
        return TrainingArguments(folder, **{**quiet, "max_grad_norm": 1.0, **more})

    optimizer = flora_dist.Flora(model.named_parameters(), lr=1e-3)
    return {
        "flora_dist": flora_dist,
        "torch": torch,
        "model": model,
        "batch": batch,
        "optimizer": optimizer,
        "loss": model(**batch).loss,
        "step": 1,
        "dataset": [{"input_ids": row, "labels": row} for _ in range(32)],
        "Trainer": Trainer,
        "TrainerCallback": TrainerCallback,
        "TrainingArguments": arguments,
        "arguments": arguments("out"),
    }


def run(code: str) -> dict[str, Any]:
    """Run a block; the names afterwards."""
    from torch.nn.parallel import DistributedDataParallel

    found = names()
    if "ddp." in code:  # only there: its reducer would take the gradients
        found["ddp"] = DistributedDataParallel(found["model"])
    if "checkpoint.load" in code:  # what a checkpoint holds, a step has made
        found["loss"].backward()
        found["optimizer"].step()
    exec(code, found)
    return found


def said(name: str) -> None:
    """Say which block comes now."""
    sys.stdout.write(f"{name}\n")
    sys.stdout.flush()


def run_on_two_processes(code: str) -> None:
    """Run a block as a program under a launcher; nothing may have started a thread before."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(server.getsockname()[1]))
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        ended = 1
        try:
            exec(code, {"__name__": "__main__"})
            ended = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(ended)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], codes


def main() -> None:
    """Runs all, says each before it starts."""
    os.environ.update(MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    import torch.distributed as dist

    every = list(blocks("python"))
    for name, code in every:
        if ON_TWO_PROCESSES in code:
            said(name)
            run_on_two_processes(code)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_PORT="0")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("configs").symlink_to(ROOT / "configs")
        ((_, zero2),) = ((n, code) for n, code in blocks("json") if n.startswith("README"))
        Path("zero2.json").write_text(json.dumps(json.loads(zero2)))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        # Those of DeepSpeed last: its import changes the process.
        chosen = [each for each in every if ON_TWO_PROCESSES not in each[1]]
        for name, code in sorted(chosen, key=lambda each: "deepspeed" in each[1]):
            said(name)
            run(code)
        sys.stdout.write(f"ran {len(every)} blocks\n")
        os.chdir("/")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

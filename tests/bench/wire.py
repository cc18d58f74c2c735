# SPDX-License-Identifier: Apache-2.0
"""Prints what compressed gradients send and hold, beside the frameworks' own.

    python -m tests.bench.wire counts       elements and bytes given to collectives, a step
    python -m tests.bench.wire backend      what gloo sends for a payload, between two hosts
    python -m tests.bench.wire interface    bytes of a step that leave the hosts, beside that cost
    python -m tests.bench.wire memory       peak bytes of gradients and accumulators under FSDP2
    python -m tests.bench.wire link         time per step on a link of 200 Mbit/s

All of them without a word. ``--only ddp`` for layouts that begin so. Hosts are namespaces on this
machine (hosts.py) and need root.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench.link import print_link
from tests.bench.wire_counts import print_counts
from tests.bench.wire_interface import print_backend, print_interface
from tests.bench.wire_memory import print_memory

TABLES: dict[str, Callable[[str], None]] = {
    "counts": print_counts,
    "backend": print_backend,
    "interface": print_interface,
    "memory": print_memory,
    "link": print_link,
}


def main() -> None:
    """Prints the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", choices=TABLES)
    parser.add_argument("--only", default="", help="layouts that begin so")
    asked = parser.parse_args()
    print(_where(), flush=True)
    for name, table in TABLES.items():
        if asked.table in {None, name}:
            print(f"\n## {name}\n", flush=True)
            table(asked.only)


def _where() -> str:
    """Machine, versions and date."""
    models = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    load = os.getloadavg()[0]
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {len(models)} x {models[0]}, Linux {platform.release()}, "
        f"load {load:.1f} before the start"
    )


if __name__ == "__main__":
    # Ranks find a body by the name of its module, which must not be __main__.
    from tests.bench import wire

    wire.main()

# SPDX-License-Identifier: Apache-2.0
"""Programs that end right behind a message, while gloo's threads still hold it.

    python -m tests.trainer.exits 300                  that many runs, the programs in turn
    python -m tests.trainer.exits 9 trainer.fsdp2      of one program alone

Gloo's thread is held behind each of the last messages until the interpreter ends
(held_worker.cpp, built here with g++). Imports are made once; each run is a fork that ends as any
interpreter does. Prints how each program's runs ended; exits with 1 if any did badly.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("held_worker.cpp")
HELD_MS = 200


def build(folder: Path) -> Path:
    """Compile what is preloaded."""
    library = folder / "held_worker.so"
    command = ["g++", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def held(runs: int, names: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run programs with gloo's threads held; the lines of their ends on stdout."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        return subprocess.run(
            [sys.executable, "-m", "tests.trainer.exits", str(runs), *names],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


# ---- the programs: none of the first destroys its group, as scripts that end do not


def _message(send: Callable[[], object]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    hold()
    send()


def all_reduce() -> None:
    from torch import ones

    from flora_dist.core.comm.groups import all_reduce_

    _message(lambda: all_reduce_(ones(5), None))


def mesh() -> None:
    from torch import ones
    from torch.distributed.device_mesh import init_device_mesh

    from flora_dist.core.comm.groups import MeshReducer

    _message(lambda: MeshReducer(mesh=init_device_mesh("cpu", (1,)), axes=(0,)).sum_(ones(5)))


def exchange() -> None:
    from torch import ones
    from torch.distributed import group

    from flora_dist.core.comm.groups import GroupReducer

    _message(lambda: GroupReducer(group=group.WORLD).exchange(ones(5), {0: 5}))


def scatter() -> None:
    from torch import ones
    from torch.distributed import group

    from flora_dist.core.comm.groups import reduce_scatter

    _message(lambda: reduce_scatter(ones(1, 5), group.WORLD))


def smallest() -> None:
    from torch import ones

    from flora_dist.core.comm.groups import smallest as find

    _message(lambda: find(ones(5), None))


def gathered() -> None:
    from flora_dist.core.comm.groups import gather

    _message(lambda: gather({"rank": 0}, None))


def unkept() -> None:
    """The fault itself: nobody but gloo's thread holds the message. Run only when named."""
    import torch.distributed as dist
    from torch import ones

    _message(lambda: dist.all_reduce(ones(5)))


def _trained(*overrides: str) -> None:
    """A whole run of the trainer, held from its last messages on."""
    from flora_dist.trainer import loop, main

    result = loop._result

    def held_from_here(*arguments: object) -> loop.RunResult:
        hold()
        return result(*arguments)  # type: ignore[arg-type]

    loop._result = held_from_here  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "text"
        corpus.write_text("the quick brown fox jumps over a lazy dog " * 300)
        short = ["train.steps=2", "evaluation.every=2", "optimizer={name: flora, lr: 1e-2}"]
        quiet = ["output.tensorboard=false", "output.progress=false"]
        where = [f"data.corpus={corpus}", f"output.folder={folder}"]
        sets = [part for o in (*where, *short, *quiet, *overrides) for part in ("--set", o)]
        assert main(["--config", str(ROOT / "tests" / "trainer" / "tiny.yaml"), *sets]) == 0


PROGRAMS: dict[str, Callable[[], None]] = {
    "all_reduce": all_reduce,
    "mesh": mesh,
    "exchange": exchange,
    "scatter": scatter,
    "smallest": smallest,
    "gathered": gathered,
    "trainer.ddp": lambda: _trained("backend.name=ddp"),
    "trainer.fsdp2": lambda: _trained("backend.name=fsdp2", "gradients.level=compressed"),
    "trainer.saving": lambda: _trained(
        "backend.name=fsdp2", "checkpoint={every: 1, asynchronous: true}"
    ),
}


def hold() -> None:
    """From here on each message's thread is held."""
    ctypes.PyDLL(os.environ["LD_PRELOAD"]).hold(HELD_MS)


def run_all(runs: int, names: Sequence[str]) -> int:
    """Fork the runs, two at a time; a run returns None as the parent's program goes on to end."""
    # Registered first, so called last: before torch and all else have their own.
    atexit.register(ctypes.PyDLL(os.environ["LD_PRELOAD"]).let_go)
    import_for(names)
    ends: dict[str, Counter[int]] = {name: Counter() for name in names}
    alive: dict[int, str] = {}
    waiting = list(islice(cycle(names), runs))
    while waiting or alive:
        if waiting and len(alive) < 2:
            name = waiting.pop()
            child = os.fork()
            if not child:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                (PROGRAMS | {"unkept": unkept})[name]()
                return 0  # and the interpreter ends
            alive[child] = name
        else:
            child, status = os.wait()
            ends[alive.pop(child)][os.waitstatus_to_exitcode(status)] += 1
    for name, counted in ends.items():
        print(name, dict(counted), flush=True)
    return int(any(code for counted in ends.values() for code in counted))


def import_for(names: Sequence[str]) -> None:
    """What the programs need, once for all of them."""

    if any(name.startswith("trainer") for name in names):
        from transformers import AutoModelForCausalLM  # noqa: F401 - takes a second

        import flora_dist.trainer.run  # noqa: F401 - it imports the rest


def main(runs: int, names: Sequence[str]) -> int:
    if "held_worker" in os.environ.get("LD_PRELOAD", ""):
        return run_all(runs, names or [*PROGRAMS])
    done = held(runs, names)
    print(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

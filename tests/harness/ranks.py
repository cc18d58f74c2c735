# SPDX-License-Identifier: Apache-2.0
"""Run a test body on several gloo ranks of this machine.

Importing torch costs seconds per process, so workers outlive one test. Each call gets a fresh
process group over a file store (no ports); a failed or hung call throws its workers away.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Beyond a body's own timeout: time for its stacks to be printed.
GRACE_SECONDS = 30.0
# No part of a body's timeout: on a busy machine torch's import alone may take minutes. It counts
# towards pytest's limit for the test, which PYTEST_TIMEOUT raises.
START_SECONDS = 900.0


class RankError(AssertionError):
    """One rank failed; the message is that rank's own traceback."""


class RankPool:
    """``world_size`` worker processes, each one rank."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._calls = 0

    def __call__(self, body: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Run ``body(*args)`` on every rank; return the results in rank order.

        ``body`` must be a module-level function: it is sent to the workers by name.
        """
        try:
            if not self._workers:
                self._start()
                self._collect(START_SECONDS)
            self._calls += 1
            store = Path(self._stores.name) / str(self._calls)
            for _, pipe in self._workers:
                pipe.send((body, args, store, timeout))
            return self._collect(timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop every worker; the next call starts new ones."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        if self._workers:
            self._stores.cleanup()
        self._workers.clear()

    def _start(self) -> None:
        # As long as the workers: a store that dies late opens its file once more, and waits for one
        # that is gone until the timeout of its group.
        self._stores = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        while len(results) < self.world_size:
            waiting = [pipe for pipe, rank in ranks.items() if rank not in results]
            ready = wait(waiting, timeout=timeout + GRACE_SECONDS)
            if not ready:
                raise RankError(f"no answer from ranks {[ranks[p] for p in waiting]}")
            for pipe in ready:
                rank = ranks[pipe]
                try:
                    succeeded, value = pipe.recv()
                except EOFError:
                    raise RankError(f"rank {rank} died (stacks are on stderr)") from None
                if not succeeded:
                    raise RankError(f"rank {rank} of {self.world_size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]


def _serve(rank: int, world_size: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    # pytest's own filter does not reach spawned workers.
    warnings.filterwarnings("error", module=r"flora_dist\.")
    with suppress(EOFError):
        pipe.send((True, None))  # ready
        while True:
            body, args, store, timeout = pipe.recv()
            faulthandler.dump_traceback_later(timeout, exit=True)
            try:
                torch.manual_seed(0)
                dist.init_process_group(
                    "gloo",
                    init_method=store.as_uri(),
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout),
                )
                result = body(*args)
                dist.barrier()
                pipe.send((True, result))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
            finally:
                faulthandler.cancel_dump_traceback_later()
                if dist.is_initialized():
                    dist.destroy_process_group()
                # DTensor remembers results by meshes that compare equal, and hands out the mesh of
                # an earlier call with names of groups that are gone, or another's (torch 2.13).
                _clear_sharding_prop_cache()
                _forget_meshes()
                # Models, hooks and groups refer to each other in circles. Each group of gloo's that
                # is left to the collector keeps three threads that wake all the time: hundreds of
                # them, in every idle worker, had taken the machine from the tests that ran.
                gc.collect()
                # What stays is torch's and ours: looking at it again takes longer than most bodies.
                gc.freeze()


def _forget_meshes() -> None:
    """Empty what DTensor remembers of redistributions: its keys hold meshes and their groups."""
    redistribute = sys.modules["torch.distributed.tensor._redistribute"]
    topology = sys.modules["torch.distributed.tensor._collective_utils"].MeshTopoInfo
    # Names of torch 2.13; the oldest and the newest supported one need not have all of them.
    for owner, name in ((redistribute, "_gen_transform_infos"), (topology, "build_from_mesh")):
        if (cached := getattr(owner, name, None)) is not None:
            cached.cache_clear()
    getattr(redistribute, "clear_redistribute_planner_cache", lambda: None)()

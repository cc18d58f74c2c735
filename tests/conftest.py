# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: pools of gloo ranks, reused through the session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.launched import (
    ROOT,
    LaunchedPool,
    clear_locks,
    deepspeed_command,
    torchrun_command,
)
from tests.harness.ranks import RankPool

# All ranks are on this machine. Without this, gloo asks the resolver for the host's own address in
# every new group, and a resolver that does not answer holds the ranks until their timeout.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# DeepSpeed compiles its helper for the CPU once per clone. Not in the user's own cache: a run of
# theirs that was killed there has left a lock that every later one waits for.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
clear_locks(older_than=600.0)
# Another ninja than that of this environment has a log of its own, and compiles everything again.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# Idle workers of another world size cost memory, not time.
_POOLS: dict[int, RankPool] = {}
_LAUNCHED: dict[int, LaunchedPool] = {}


def pool_of(world_size: int) -> RankPool:
    """The session's pool of that size."""
    return _POOLS.setdefault(world_size, RankPool(world_size))


def launched_pool_of(world_size: int) -> LaunchedPool:
    """The session's launch of that size: torchrun for three ranks, else the deepspeed launcher."""
    command = torchrun_command if world_size == 3 else deepspeed_command
    return _LAUNCHED.setdefault(world_size, LaunchedPool(command, world_size))


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> RankPool:
    """The pool whose size the test's ``ranks(n)`` marker names."""
    marker = request.node.get_closest_marker("ranks")
    assert marker is not None, "a test with ranks needs @pytest.mark.ranks(n)"
    return pool_of(marker.args[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share tests out by file, where pytest-xdist has several workers."""
    from tests.harness.workers import ByFile

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on several hosts, the longest, begin."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)


@pytest.fixture(scope="session", autouse=True)
def _stop_pools() -> Iterator[None]:
    yield
    for pool in (*_POOLS.values(), *_LAUNCHED.values()):
        pool.close()

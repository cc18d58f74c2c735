# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: pools of gloo ranks, reused through the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.ranks import RankPool

# Idle workers of another world size cost memory, not time.
_POOLS: dict[int, RankPool] = {}


def pool_of(world_size: int) -> RankPool:
    """The session's pool of that size."""
    return _POOLS.setdefault(world_size, RankPool(world_size))


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> RankPool:
    """The pool whose size the test's ``ranks(n)`` marker names."""
    marker = request.node.get_closest_marker("ranks")
    assert marker is not None, "a test with ranks needs @pytest.mark.ranks(n)"
    return pool_of(marker.args[0])


@pytest.fixture(scope="session", autouse=True)
def _stop_pools() -> Iterator[None]:
    yield
    for pool in _POOLS.values():
        pool.close()

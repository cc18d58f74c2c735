# SPDX-License-Identifier: Apache-2.0
"""How the processes of a restart find each other in a store that an earlier start has used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from flora_dist.trainer.rendezvous import agree_on_name

SOON, LATE = timedelta(seconds=0.2), timedelta(seconds=60)


def names(store: dist.Store, size: int, came: int, timeout: timedelta) -> list[str]:
    """What each of the processes that came has agreed on; they are threads here."""
    with ThreadPoolExecutor(came) as pool:
        # Process 0 last: what an earlier start has asked stands there when it comes.
        asked = [
            pool.submit(agree_on_name, store, rank, size, timeout) for rank in reversed(range(came))
        ]
        return [each.result() for each in asked]


def test_each_start_agrees_on_a_name_of_its_own() -> None:
    store = dist.HashStore()
    found = [names(store, 3, 3, LATE) for _ in range(3)]
    assert [len(set(start)) for start in found] == [1, 1, 1]
    assert len({start[0] for start in found}) == 3


def test_a_start_that_lost_a_process_on_the_way_does_not_mislead_the_next() -> None:
    store = dist.HashStore()
    store.set_timeout(LATE)
    with pytest.raises(dist.DistStoreError, match=r"processes \[2\] did not come in time"):
        names(store, 3, 2, SOON)
    # Its process 1 asked again, and died before it was answered.
    store.set("question/1", "of a process that is dead")
    assert len(set(names(store, 3, 3, LATE))) == 1

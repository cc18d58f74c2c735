# SPDX-License-Identifier: Apache-2.0
"""Where the processes of one start meet, apart from those of an earlier start of the same job."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

_PAUSE_S = 0.01


class _Store(Protocol):
    """What of torch's key-value store is used here."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes:
        """Waits until it is set."""

    def check(self, keys: list[str]) -> bool: ...


def has_agent_store() -> bool:
    """Whether torchrun keeps the store in which processes meet.

    It keeps one for all restarts, in torch 2.13: a process that is started again finds the address
    of one that is dead, and cannot connect. Restarts are counted by each agent for itself, so the
    count tells starts apart on one machine only.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_store(process_rank: int, size: int, timeout: timedelta) -> Any:
    """Torchrun's store under a name that only the processes of this start know.

    Raises:
        DistError: another process did not come within the timeout.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, timeout=timeout, wait_for_workers=False
    )
    name = agree_on_name(store, process_rank, size, timeout)
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def agree_on_name(store: _Store, process_rank: int, size: int, timeout: timedelta) -> str:
    """A name that process 0 has made up, as every process learns it.

    What an earlier start has left in the store misleads nobody: a process waits for the answer to a
    question that is its own, and process 0 for thanks that carry its name.
    """
    if process_rank == 0:
        name = uuid.uuid4().hex
        _answer(store, name, set(range(1, size)), time.monotonic() + timeout.total_seconds())
        return name
    question = uuid.uuid4().hex
    store.set(f"question/{process_rank}", question)
    name = store.get(f"answer/{question}").decode()
    store.set(f"thanks/{name}/{process_rank}", "")
    return name


def _answer(store: _Store, name: str, missing: set[int], deadline: float) -> None:
    answered: set[str] = set()
    while missing:
        for process_rank in sorted(missing):
            if store.check([f"thanks/{name}/{process_rank}"]):
                missing.remove(process_rank)
            elif store.check([f"question/{process_rank}"]):
                question = store.get(f"question/{process_rank}").decode()
                if question not in answered:  # by a dead process, perhaps: the next one asks anew
                    store.set(f"answer/{question}", name)
                    answered.add(question)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"processes {sorted(missing)} did not come in time")
        time.sleep(_PAUSE_S)

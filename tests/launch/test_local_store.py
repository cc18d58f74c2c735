# SPDX-License-Identifier: Apache-2.0
"""The processes of one machine meet at its own address, whoever keeps their store."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flora_dist.cluster.local_store import local_store
from flora_dist.trainer.backend import process_group
from flora_dist.trainer.config import BackendConfig
from flora_dist.trainer.replicated import World
from flora_dist.world import ProcessPlace, is_of_this_machine, listen_at

LOOPBACK = "0100007F"  # as the kernel writes 127.0.0.1
SOON = timedelta(seconds=30)


@pytest.fixture
def port() -> int:
    with listen_at("127.0.0.1", 0) as listening:
        return int(listening.getsockname()[1])


def listening_at(port: int) -> set[str]:
    """Addresses at which somebody listens on a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, _, number = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(number, 16) == port:
                found.add(address)
    return found


def place(process_rank: int, port: int) -> ProcessPlace:
    return ProcessPlace(
        process_rank=process_rank,
        size=2,
        local_rank=process_rank,
        local_size=2,
        address="localhost",
        port=port,
        launcher="variables",
    )


def test_a_store_of_one_machine_is_reached_by_its_processes_alone(port: int) -> None:
    first = local_store(place(0, port), SOON)
    second = local_store(place(1, port), SOON)
    second.set("word", "said")
    assert first.get("word") == b"said"
    assert listening_at(port) == {LOOPBACK}


def test_the_trainer_by_itself_listens_to_no_other_machine(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by the deepspeed launcher or by hand: torch's own store listened everywhere."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    settings = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    alone = World(process_rank=0, size=1, device=torch.device("cpu"))
    with process_group(BackendConfig(name="ddp"), alone):
        assert dist.is_initialized()
        assert listening_at(port) == {LOOPBACK}


def test_addresses_of_this_machine_are_known() -> None:
    assert [is_of_this_machine(each) for each in ("127.0.0.1", "127.0.1.1", "localhost")] == [
        True
    ] * 3
    others = (None, "10.77.0.1", "gone.invalid", "")
    assert [is_of_this_machine(each) for each in others] == [False] * 4

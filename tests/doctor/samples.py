# SPDX-License-Identifier: Apache-2.0
"""Two healthy hosts, and a job on them, as the doctor would have seen them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flora_dist.cluster.doctor.facts import Build, HostFacts, Interface, Kernels, Limits, Network
from flora_dist.cluster.doctor.links import Connection
from flora_dist.cluster.doctor.survey import Asked, Link, RankSaid, Survey
from flora_dist.cluster.launch.hosts import Host

LOOP = Interface(name="lo", address="127.0.0.1", mtu=65536)
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}


def asked(**changed: Any) -> Asked:
    base = Asked(
        hosts=(Host(name="a", slots=1), Host(name="b", slots=1)),
        master="10.0.0.1",
        port=29500,
        python="/env/bin/python",
        folder="/work",
        environment={},
        lines=(),
        config=None,
        seed=None,
        mpi=False,
        minimum_mbit=None,
        timeout_s=60.0,
        ranks=True,
    )
    return replace(base, **changed)


def facts(name: str, **changed: Any) -> HostFacts:
    base = HostFacts(
        name=name,
        python="3.11.7",
        packages={"torch": "2.13.0", "flora-dist": "0.1.0", "deepspeed": "0.19.8"},
        source="0123456789ab",
        folder="/work",
        cpus=8,
        clock_ahead_s=0.01,
        clock_doubt_s=0.1,
        gpus=(),
        gpu_trouble=None,
        network=Network(
            interfaces=(LOOP, Interface(name="eth0", address=ADDRESSES[name], mtu=1500)),
            toward="eth0",
            names=ADDRESSES,
            own=ADDRESSES[name],
            gloo=None,
            nccl=None,
            infiniband=False,
        ),
        limits=Limits(
            shm_bytes=8 << 30, open_files=1 << 16, locked_bytes=1 << 16, free_bytes=90 << 30
        ),
        build=Build(
            compiler="/usr/bin/c++",
            ninja="/usr/bin/ninja",
            headers=True,
            ready=False,
            built_in=False,
        ),
        kernels=Kernels(path="native", reason=""),
        locks=(),
        lines=(),
        mpi_trouble=None,
        config=None,
    )
    return replace(base, **changed)


def survey(*, b: dict[str, Any] | None = None, **changed: Any) -> Survey:
    """Healthy but for what is changed: ``b`` of host b's facts, the rest of the survey."""
    base = Survey(
        asked=asked(),
        facts=(facts("a"), facts("b", **(b or {}))),
        links=(link("a", "b"), link("b", "a")),
        ranks=(rank(0, "a"), rank(1, "b")),
    )
    return replace(base, **changed)


def network(**changed: Any) -> Network:
    """Host b's, changed."""
    return replace(facts("b").network, **changed)


def limits(**changed: Any) -> Limits:
    return replace(facts("b").limits, **changed)


def link(source: str, target: str, mbit: float | None = 9000.0, **changed: Any) -> Link:
    measured = Connection(trouble=None, trip_ms=0.1, there_mbit=mbit, back_mbit=mbit)
    address = ADDRESSES.get(target, "10.0.0.9")
    base = Link(source=source, target=target, address=address, port=4000, measured=measured)
    return replace(base, **changed)


def rank(number: int, host: str, **changed: Any) -> RankSaid:
    result = {
        "wrong_sum": None, "small_s": 1e-4, "large_s": 1e-2, "projection": {"cpu": "f00d"},
        "seed": 0, "torch": "2.13.0", "nccl": None, "device": "cpu",
    }  # fmt: skip
    base = RankSaid(host=host, process_rank=number, code=0, stage="done", result=result, error="")
    return replace(base, **changed)


def with_result(number: int, host: str, **changed: Any) -> RankSaid:
    """A rank with other results."""
    base = rank(number, host)
    return replace(base, result={**(base.result or {}), **changed})

# SPDX-License-Identifier: Apache-2.0
"""Each rule finds its fault in what two hosts say, names the host, and is silent without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flora_dist.cluster.doctor.facts import (
    Build,
    ConfigFacts,
    EnvironmentLine,
    Gpu,
    Interface,
    Kernels,
)
from flora_dist.cluster.doctor.findings import ON_FACTS, ON_LINKS, ON_RANKS, apply
from flora_dist.cluster.doctor.links import Connection
from flora_dist.cluster.doctor.survey import LOST, Finding, Port, Survey
from flora_dist.cluster.launch.hosts import Host
from flora_dist.cluster.launch.locks import Lock
from tests.doctor.samples import (
    LOOP,
    asked,
    facts,
    limits,
    link,
    network,
    rank,
    survey,
    with_result,
)

H100, A100 = Gpu(name="H100", driver="570.1"), Gpu(name="A100", driver="570.1")
GPUS = tuple(facts(name, gpus=(H100, H100)) for name in "ab")


def _config(digest: str, **seeds: str) -> ConfigFacts:
    return ConfigFacts(digest=digest, seeds=seeds, trouble=None)


def _with_config(a: ConfigFacts, b: ConfigFacts) -> Survey:
    job = asked(config="run.yaml")
    return survey(asked=job, facts=(facts("a", config=a), facts("b", config=b)))


def _gpus(second: object, **changed: object) -> Survey:
    return survey(facts=(GPUS[0], facts("b", gpus=second, **changed)))


def _slots(slots: int, **changed: object) -> Survey:
    job = asked(hosts=(Host(name="a", slots=1), Host(name="b", slots=slots)))
    return survey(asked=job, **changed)


def _build(**changed: object) -> dict[str, object]:
    return {"build": replace(facts("b").build, **changed)}


OLD_LOCK = Lock(path="/x/lock", age_s=3600.0, is_held=False)
HELD_LOCK = replace(OLD_LOCK, is_held=True)
BAD_LINE = EnvironmentLine(path="~/.deepspeed_env", number=2, text="", breaks=True)
THREE = [link("a", "b"), link("a", "c", 400.0), link("b", "c", 500.0)]

# What was seen, the finding's subject, its hosts, words of it, and its severity.
FAULTS: dict[str, tuple[Survey, str, tuple[str, ...], str, str]] = {
    "python": (survey(b={"python": "3.12.1"}), "python", ("a", "b"), "3.12 on b", "error"),
    "python's patch": (
        survey(b={"python": "3.11.9"}), "python", ("a", "b"), "3.11.9 on b", "warning",
    ),
    "a package is missing on one": (
        survey(b={"packages": {"torch": "2.13.0", "flora-dist": "0.1.0"}}),
        "package", ("a", "b"), "deepspeed differs: 0.19.8 on a; missing on b", "error",
    ),
    "torch is missing on all": (
        survey(facts=tuple(facts(name, packages={}) for name in "ab")),
        "package", ("a", "b"), "torch is missing on a, b", "error",
    ),
    "slots above GPUs": (
        _slots(3, facts=GPUS), "slots", ("b",), "b has 3 slots and 2 GPUs", "error",
    ),
    "slots above cores": (_slots(9), "slots", ("b",), "9 slots and 8 CPU cores", "warning"),
    "GPUs on one host alone": (_gpus(()), "gpu", ("b",), "no GPU on b", "error"),
    "another GPU": (_gpus((A100, A100)), "gpu", ("a", "b"), "A100 on b", "warning"),
    "another driver": (
        _gpus((Gpu(name="H100", driver="550.2"),) * 2), "gpu", ("a", "b"), "550.2 on b", "warning",
    ),
    "nvidia-smi fails": (
        survey(b={"gpu_trouble": "driver/library version mismatch"}),
        "gpu", ("b",), "nvidia-smi fails on b: driver/library", "error",
    ),
    "shared memory for several ranks": (
        _slots(2, facts=(facts("a"), facts("b", limits=limits(shm_bytes=100 << 20)))),
        "shm", ("b",), "/dev/shm of b has 100 MiB; DeepSpeed's helper for CPUs needs 132", "error",
    ),
    "docker's shared memory": (
        survey(b={"limits": limits(shm_bytes=64 << 20)}), "shm", ("b",), "64 MiB", "warning",
    ),
    "locked memory beside InfiniBand": (
        survey(b={"network": network(infiniband=True)}), "limits", ("b",), "InfiniBand", "warning",
    ),
    "a full disk": (
        survey(b={"limits": limits(free_bytes=5 << 20)}), "disk", ("b",), "5 MiB left", "warning",
    ),
    "a clock": (survey(b={"clock_ahead_s": -9.0}), "clock", ("b",), "9.0 s behind", "warning"),
    "no folder": (survey(b={"folder": None}), "folder", ("b",), "/work does not exist", "error"),
    "no headers": (survey(b=_build(headers=False)), "compiler", ("b",), "Python.h", "error"),
    "no compiler": (survey(b=_build(compiler=None)), "compiler", ("b",), "g++", "error"),
    "no ninja, though all is compiled": (
        survey(b=_build(ninja=None, ready=True)), "compiler", ("b",), "ninja", "error",
    ),
    "no kernels": (
        survey(b={"kernels": Kernels(path="torch", reason="none are installed. Compile")}),
        "kernels", ("b",), "by torch's operators, which are slower", "warning",
    ),
    "a choice of kernels that is none": (
        survey(b={"kernels": Kernels(path="none", reason="must be torch, native or unset")}),
        "kernels", ("b",), "no job can start on b", "error",
    ),
    "a stale lock": (survey(b={"locks": (OLD_LOCK,)}), "lock", ("b",), "/x/lock", "error"),
    "a broken line": (
        survey(b={"lines": (BAD_LINE,)}), "deepspeed_env", ("b",), "line 2 of ~/", "error",
    ),
    "a broken line where no rank runs": (
        survey(asked=asked(lines=(BAD_LINE,))),
        "deepspeed_env", ("this machine",), "on this machine", "error",
    ),
    "a value with spaces": (
        survey(b={"lines": (replace(BAD_LINE, text="A=...", breaks=False),)}),
        "deepspeed_env", ("b",), "pdsh and Open MPI read it differently", "warning",
    ),
    "seeds": (
        _with_config(_config("1", seed="1"), _config("2", seed="2")),
        "seed", ("a", "b"), "seed of run.yaml differs: 1 on a; 2 on b", "error",
    ),
    "configs of one seed": (
        _with_config(_config("1", seed="1"), _config("2", seed="1")),
        "config", ("a", "b"), "digest 1 on a; 2 on b", "error",
    ),
    "a config that is not there": (
        _with_config(_config("1"), replace(_config(""), trouble="No such file or directory")),
        "config", ("b",), "cannot be read on b: No such file", "error",
    ),
    "mpi4py": (survey(b={"mpi_trouble": "no libmpi"}), "mpi4py", ("b",), "no libmpi", "error"),
    "a name that one host does not know": (
        survey(b={"network": network(names={"a": None, "b": "10.0.0.2"})}),
        "name", ("b",), "b does not resolve the name a", "error",
    ),
    "a name of two addresses": (
        survey(b={"network": network(names={"a": "10.9.9.9", "b": "10.0.0.2"})}),
        "name", ("a", "b"), "10.9.9.9 on b", "warning",
    ),
    "an own name that is loopback": (
        survey(b={"network": network(own="127.0.1.1")}),
        "own name", ("b",), "b resolves its own host name to 127.0.1.1", "warning",
    ),
    "an own name that is none": (
        survey(b={"network": network(own=None)}), "own name", ("b",), "does not resolve", "warning",
    ),
    "no way to process 0": (
        survey(b={"network": network(toward=None)}), "interface", ("b",), "no route to", "error",
    ),
    "an interface of gloo that is not there": (
        survey(b={"network": network(gloo="eth9")}),
        "interface", ("b",), "GLOO_SOCKET_IFNAME=eth9 on b, which has no such", "error",
    ),
    "an interface of NCCL that is not there": (
        survey(b={"network": network(nccl="ib")}),
        "interface", ("b",), "NCCL_SOCKET_IFNAME=ib on b", "error",
    ),
    "NCCL on loopback": (
        survey(b={"network": network(nccl="=lo")}),
        "interface", ("b",), "the way to 10.0.0.1 is eth0", "error",
    ),
    "all interfaces of NCCL excluded": (
        survey(b={"network": network(nccl="^eth,lo")}),
        "interface", ("b",), "NCCL_SOCKET_IFNAME=^eth,lo on b", "error",
    ),
    "another network": (
        survey(b={"network": network(
            gloo="ib0",
            interfaces=(*facts("b").network.interfaces,
                        Interface(name="ib0", address="10.1.0.2", mtu=1500)),
        )}),
        "interface", ("b",), "GLOO_SOCKET_IFNAME=ib0 on b, but the way", "warning",
    ),
    "packets of another size": (
        survey(b={"network": network(
            interfaces=(LOOP, Interface(name="eth0", address="10.0.0.2", mtu=9000)),
        )}),
        "mtu", ("a", "b"), "9000 on b", "warning",
    ),
    "a port that is taken": (
        survey(ports=(Port(host="a", port=29500, trouble="Address already in use"),)),
        "port", ("a",), "port 29500 of a cannot be opened: Address already in use", "error",
    ),
    "no connection": (
        survey(links=(link("b", "a", measured=Connection(trouble="no answer within 4 s")),)),
        "reach", ("b", "a"), "b cannot connect to a at 10.0.0.1:4000", "error",
    ),
    "links of one host": (
        survey(links=tuple(THREE)), "slow", ("c",),
        "all 2 links of c are slow: 400 Mbit/s; the fastest of the job has 9000", "warning",
    ),
    "one link": (
        survey(links=(*THREE[:2], link("b", "c"))), "slow", ("a", "c"),
        "the link a to c is slow: 400", "warning",
    ),
    "a link below the minimum": (
        survey(asked=asked(minimum_mbit=1e4), links=(link("a", "b"), link("b", "a", None))),
        "slow", ("a", "b"), "asked for 10000", "error",
    ),
    "a rank that died": (
        survey(ranks=(
            rank(0, "a", code=None, stage="torch loaded", result=None),
            rank(1, "b", code=1, stage="started", result=None, error="ImportError: libx"),
        )),
        "rank", ("b",), "rank 1 on b ended with code 1 at the stage 'started': Imp", "error",
    ),
    "a rank that was killed": (
        survey(ranks=(
            rank(0, "a", code=1, stage="torch loaded", result=None, error="reset by peer"),
            rank(1, "b", code=-9, stage="started", result=None),
        )),
        "rank", ("b",), "ended with code -9", "error",
    ),
    "a host that went away": (
        survey(ranks=(
            rank(0, "a", code=1, stage="group formed", result=None, error="reset by peer"),
            rank(1, "b", code=None, stage=LOST, result=None, error="not responding"),
        )),
        "rank", ("b",), "rank 1 on b is lost with its host: not responding", "error",
    ),
    "ranks that were not done in time": (
        survey(ranks=(rank(0, "a"), rank(1, "b", code=None, stage="group formed", result=None))),
        "rank", ("b",), "did not finish in time at the stage 'group formed'", "error",
    ),
    "a wrong sum": (
        survey(ranks=(rank(0, "a"), with_result(1, "b", wrong_sum="1 of 9 elements"))),
        "all-reduce", ("b",), "wrong at rank 1 on b: 1 of 9 elements", "error",
    ),
    "other bits": (
        survey(ranks=(rank(0, "a"), with_result(1, "b", projection={"cpu": "beef"}))),
        "projection", ("a", "b"), "beef on rank 1 on b (cpu)", "error",
    ),
    "other bits on one GPU": (
        survey(ranks=(rank(0, "a"),
                      with_result(1, "b", projection={"cpu": "f00d", "cuda": "beef"}))),
        "projection", ("b",), "beef on rank 1 on b (cuda)", "error",
    ),
    "another torch in the end": (
        survey(ranks=(rank(0, "a"), with_result(1, "b", torch="2.12.0"))),
        "package", ("a", "b"), "2.12.0 on rank 1 on b", "error",
    ),
    "another NCCL": (
        survey(ranks=tuple(
            with_result(n, host, nccl=f"2.2{n}") for n, host in enumerate(["a", "b"])
        )),
        "nccl", ("a", "b"), "2.21 on rank 1 on b", "error",
    ),
}  # fmt: skip


def _all(seen: Survey) -> tuple[Finding, ...]:
    return apply((*ON_FACTS, *ON_LINKS, *ON_RANKS), seen)


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_names_the_fault_and_no_other_rule_speaks(name: str) -> None:
    seen, subject, hosts, words, severity = FAULTS[name]
    found = _all(seen)
    (named,) = [each for each in found if words in each.what] or [None]
    assert named is not None, found
    assert (named.subject, named.hosts, named.severity) == (subject, hosts, severity)
    assert named.remedy
    assert {each.subject for each in found} == {subject}


HEALTHY = {
    "two hosts": survey(),
    "GPUs on all": survey(facts=GPUS),
    "a lock that another host holds": survey(
        facts=(facts("a", locks=(HELD_LOCK,)), facts("b", locks=(OLD_LOCK,)))
    ),
    "a lock that is young": survey(b={"locks": (replace(OLD_LOCK, age_s=200.0),)}),
    "what is compiled needs no compiler": survey(
        b={
            "build": Build(
                compiler=None, ninja="/usr/bin/ninja", headers=False, ready=True, built_in=False
            )
        }
    ),
    "what DeepSpeed was installed with needs nothing": survey(
        b={"build": Build(compiler=None, ninja=None, headers=False, ready=False, built_in=True)}
    ),
    "GPUs need no helper for CPUs": survey(
        facts=tuple(replace(host, build=replace(host.build, compiler=None)) for host in GPUS)
    ),
    "kernels that nobody wants": survey(b={"kernels": Kernels(path="torch", reason="")}),
    "GPUs need no kernels for CPUs": survey(
        facts=tuple(
            replace(host, kernels=Kernels(path="torch", reason="none are installed"))
            for host in GPUS
        )
    ),
    "an interface hides the own name": survey(b={"network": network(own=None, gloo="eth0")}),
    "NCCL's forms": survey(b={"network": network(nccl="^docker,lo")}),
    "NCCL's beginnings": survey(b={"network": network(nccl="eth")}),
    "a question that took long": survey(b={"clock_ahead_s": 4.0, "clock_doubt_s": 3.0}),
    "a host alone with any name": survey(
        asked=asked(hosts=(Host(name="b", slots=1),)),
        facts=(facts("b", network=network(own="127.0.1.1", toward="lo")),),
    ),
    "links within what is usual": survey(links=(link("a", "b"), link("b", "a", 3000.0))),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_rule_speaks_of(name: str) -> None:
    assert _all(HEALTHY[name]) == ()


def test_ranks_of_two_seeds_are_not_compared() -> None:
    other = with_result(1, "b", projection={"cpu": "beef"}, seed=1)
    assert apply(ON_RANKS, survey(ranks=(rank(0, "a"), other))) == ()

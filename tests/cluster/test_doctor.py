# SPDX-License-Identifier: Apache-2.0
"""`flora-dist doctor` on hosts of their own: each planted fault is named, and nothing else."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flora_dist.cluster.launch.far_end import SILENCE_S
from tests.cluster import doctor_faults as faults
from tests.cluster.doctor_cases import CONFIG, FAULTS, Cluster
from tests.cluster.doctor_faults import until
from tests.cluster.hosts import Host, hosts
from tests.harness.launched import ROOT

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    scratch = tmp_path_factory.mktemp("doctor")
    with hosts(3) as made:
        found = Cluster(hosts=made, scratch=scratch)
        found.config.write_text(CONFIG.format(seed=7))
        yield found


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_found_and_named_and_nothing_else(
    cluster: Cluster, name: str
) -> None:
    fault = FAULTS[name]
    options = ("--quick", "--config", str(cluster.config), *fault.options)
    with fault.plant(cluster):
        code, report = cluster.doctor(*options, count=fault.count)
    named = [
        finding
        for finding in report["findings"]
        if all(words in finding["what"] for words in fault.says)
    ]
    assert named, report["findings"]
    for finding in named:
        assert finding["subject"] == fault.subject
        assert tuple(finding["hosts"]) == fault.hosts
        assert finding["severity"] == fault.severity
        assert finding["remedy"]
    assert {finding["subject"] for finding in report["findings"]} <= {
        fault.subject,
        *fault.others,
    }, report["findings"]
    assert code == (1 if fault.severity == "error" else 0)


def test_healthy_hosts_are_left_in_peace(cluster: Cluster) -> None:
    code, report = cluster.doctor("--config", str(cluster.config), "--launcher", "openmpi")
    assert (code, report["findings"]) == (0, []), report
    assert [rank["result"]["wrong_sum"] for rank in report["ranks"]] == [None] * 3
    assert len({rank["result"]["projection"]["cpu"] for rank in report["ranks"]}) == 1
    assert {host["network"]["toward"] for host in report["hosts"]} == {"eth0"}
    # Three pairs, both ways, and two hosts to the port of process 0.
    assert len(report["links"]) == 8
    assert report["all_reduce"]["bus_bytes_per_s"] > 0


def test_a_wrong_sum_and_other_bits_of_a_projection_are_named_by_rank_and_host(
    cluster: Cluster,
) -> None:
    with faults.start_of_python(cluster.hosts[1], faults.WRONG_SUM + faults.OTHER_BITS):
        code, report = cluster.doctor(count=2)
    assert code == 1
    wrong_sum, other_bits = report["findings"]
    assert (wrong_sum["subject"], wrong_sum["hosts"]) == ("all-reduce", ["node2"])
    assert "wrong at rank 1 on node2: 1 of 2097152 elements, the first at 5" in wrong_sum["what"]
    assert other_bits["subject"] == "projection"
    assert "on rank 1 on node2 (cpu)" in other_bits["what"]


def test_a_rank_that_dies_is_named_and_nobody_waits_for_it(cluster: Cluster) -> None:
    with faults.start_of_python(cluster.hosts[1], faults.DIES):
        # Without the early end the others would wait for these 250 s, beyond the call's 120.
        code, report = cluster.doctor("--timeout", "250", count=2)
    assert code == 1
    (found,) = report["findings"]
    assert (found["subject"], found["hosts"]) == ("rank", ["node2"])
    assert "rank 1 on node2 ended with code 1" in found["what"]
    assert "libsomething.so.1: cannot open shared object" in found["what"]


def test_a_name_that_does_not_resolve_is_named_and_the_others_are_examined(
    cluster: Cluster,
) -> None:
    hostfile = cluster.hostfile(["node1", "node2", "node9"])
    done = cluster.call("--hostfile", str(hostfile), "--quick")
    assert done.returncode == 1
    assert "error: the name node9 does not resolve here. Correct the hostfile" in done.stdout
    assert "node1 to node2" in done.stdout


def test_a_folder_that_one_host_lacks_is_named(cluster: Cluster) -> None:
    cluster.hosts[0].run("mkdir", "-p", "/root/run")
    code, report = cluster.doctor("--quick", folder=Path("/root/run"))
    assert code == 1
    assert {(each["subject"], *each["hosts"]) for each in report["findings"]} == {
        ("folder", "node2"),
        ("folder", "node3"),
    }


def test_a_link_below_what_is_asked_for_is_an_error(cluster: Cluster) -> None:
    with faults.slow(cluster.hosts[1], 100):
        code, report = cluster.doctor("--quick", "--minimum", "500", count=2)
    assert code == 1
    (found,) = report["findings"]
    assert found["subject"] == "slow"
    assert "node1 to node2" in found["what"]
    assert "asked for 500" in found["what"]


def test_a_mistake_in_the_hostfile_has_its_own_exit_code(cluster: Cluster) -> None:
    path = cluster.scratch / "broken"
    path.write_text("node1 slots=two\n")
    done = cluster.call("--hostfile", str(path))
    assert done.returncode == 2
    assert "slots must be a whole number" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_anywhere_when_the_doctor_is_killed(
    cluster: Cluster, number: signal.Signals
) -> None:
    first, second = cluster.hosts[:2]
    hostfile = cluster.hostfile([first.name, second.name])
    words = ("-m", "flora_dist.cluster.doctor", "--hostfile", hostfile, "--timeout", "250")
    # One rank that sleeps on its way: the other waits for it in the group.
    sleeps = faults.AFTER_IMPORT.format(module="torch", change="    import time; time.sleep(300)")
    with faults.start_of_python(second, sleeps):
        running = first.start(sys.executable, *words, folder=ROOT)
        try:
            until(lambda: all(_ranks(host) for host in (first, second)))
            (doctor,) = [
                pid for pid, argv in first.commands().items() if "flora_dist.cluster.doctor" in argv
            ]
            os.kill(doctor, number)
            # Sooner than by their own silence, which they would notice without the link's end.
            until(lambda: not first.commands() and not second.commands(), SILENCE_S - 5.0)
        finally:
            running.wait(timeout=30)


def _ranks(host: Host) -> list[int]:
    return [
        pid for pid, argv in host.commands().items() if "flora_dist.cluster.doctor.ranks" in argv
    ]

# SPDX-License-Identifier: Apache-2.0
"""Every launcher's variables lead to the same place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flora_dist.world import interface_toward, interfaces, join, read_world, timeout_minutes

TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "job"},
}
DEEPSPEED = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
}
MPIRUN = {
    **{"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"},
}
SLURM = {
    **{"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
    **{"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[07-08]"},
}


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED, MPIRUN, SLURM])
def test_each_launcher_says_the_same_place(variables: dict[str, str]) -> None:
    place = read_world(variables)
    found = (place.process_rank, place.size, place.local_rank, place.local_size)
    assert found == (5, 8, 1, 4)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed"), (MPIRUN, "mpirun"), (SLURM, "slurm")],
)
def test_the_launcher_is_named(variables: dict[str, str], launcher: str) -> None:
    assert read_world(variables).launcher == launcher


def test_slurm_leads_to_its_first_host_and_a_port_of_the_job() -> None:
    place = read_world(SLURM)
    assert (place.address, place.port) == ("gpu07", 20077)
    chosen = read_world({**SLURM, "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4"})
    assert (chosen.address, chosen.port) == ("10.0.0.9", 4)


def test_torchrun_inside_a_step_of_slurm_counts() -> None:
    assert read_world({**SLURM, **TORCHRUN, "RANK": "2"}).process_rank == 2


def test_the_batch_script_of_slurm_is_alone() -> None:
    """It sees SLURM_PROCID=0 and SLURM_NTASKS=8, and would wait for seven that nobody starts."""
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77", "SLURM_LOCALID": "0"}
    assert read_world(batch).size == 1


def test_joining_gives_torch_its_own_names() -> None:
    environment = dict(SLURM)
    join(environment)
    assert environment["RANK"] == "5"
    assert environment["WORLD_SIZE"] == "8"
    assert environment["LOCAL_RANK"] == "1"
    assert environment["MASTER_ADDR"] == "gpu07"


def test_joining_alone_leaves_the_environment_as_it_is() -> None:
    environment: dict[str, str] = {"HOME": "/"}
    join(environment)
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is missing"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({**SLURM, "SLURM_STEP_NODELIST": "[", "MASTER_ADDR": ""}, "must begin with a host"),
    ],
)
def test_variables_that_contradict_are_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_world(variables)


def test_mpirun_without_mpi4py_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    without = {name: value for name, value in MPIRUN.items() if not name.startswith("MASTER")}
    with pytest.raises(ValueError, match=r"flora-dist\[mpi\]"):
        join(without)


def test_the_way_to_this_machine_is_its_loopback() -> None:
    assert interface_toward("127.0.0.1") == "lo"
    assert interfaces()["lo"] == "127.0.0.1"


def test_an_address_without_a_way_has_no_interface() -> None:
    code = "from flora_dist.world import interface_toward as f; print(f('203.0.113.1'))"
    alone = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", code]
    done = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert done.stdout == "None\n", done.stderr


def test_the_timeout_of_the_launch_is_in_minutes() -> None:
    assert timeout_minutes({}) is None
    assert timeout_minutes({"FLORA_TIMEOUT_MINUTES": "0.5"}) == 0.5

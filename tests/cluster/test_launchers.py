# SPDX-License-Identifier: Apache-2.0
"""The trainer on two and three hosts, through every launcher, against the run on one host."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from flora_dist.checkpoint.convert.command import convert
from tests.cluster.hosts import Host, hosts
from tests.cluster.jobs import (
    DEEPSPEED,
    LAUNCHERS,
    ROOT,
    SBATCH,
    VARIABLES,
    backend_of,
    door,
    left_on,
    nodes,
    trainer,
)
from tests.cluster.slurm import slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240), pytest.mark.usefixtures("helper")]

# The same processes, sums in the same order: other hosts change nothing but where they run. The
# reduction of gloo may pair processes otherwise; one rounding of fp32 in 6 steps at lr 1e-2.
TOLERANCE = 1e-6
STEPS = 6
LIMIT_S = 150.0


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def one_host(
    pair: list[Host], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the runs of two processes on one host, by backend."""
    found = {}
    for launcher in ("pdsh", "torchrun"):
        folder = tmp_path_factory.mktemp(f"one-{launcher}")
        found[backend_of(launcher)] = trained(
            pair[:1], [2], launcher, folder, corpus, ("--launcher", launcher, "--slots", "2")
        )
    return found


def trained(
    on: Sequence[Host],
    slots: Sequence[int],
    launcher: str,
    folder: Path,
    corpus: Path,
    how: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    more: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """The weights that a job on hosts ends with; it must leave nothing behind."""
    settings = (f"checkpoint.every={STEPS}", *more)
    words = trainer(folder, corpus, backend_of(launcher), *settings)
    where = how or ("--launcher", launcher, *nodes(launcher, on, slots))
    running = door(on[0], folder, *where, *words, environment=environment)
    assert running.code(LIMIT_S) == 0, running.text()[-8000:]
    assert not left_on(on)
    return weights(folder)


def ended_as(host: Host, job: str, environment: dict[str, str]) -> str:
    """The state in which Slurm's job ends; `sbatch --wait` looks for it twice a minute at most."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        shown = host.run("scontrol", "show", "job", "-o", job, environment=environment).stdout
        state = shown.partition("JobState=")[2].split()[0]
        if state not in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}:
            return state
        time.sleep(0.2)
    return "not over"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    target = folder / "weights.pt"
    convert(folder / "tiny" / "checkpoints", target)
    loaded: dict[str, torch.Tensor] = torch.load(target, weights_only=True)["model"]
    return loaded


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "slurm"])
def test_two_hosts_train_what_one_host_trains(
    launcher: str,
    pair: list[Host],
    one_host: dict[str, dict[str, torch.Tensor]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    found = trained(pair, [1, 1], launcher, tmp_path, corpus)
    assert_same(found, one_host[backend_of(launcher)])


def test_two_hosts_of_slurm_train_what_one_host_trains(
    pair: list[Host],
    one_host: dict[str, dict[str, torch.Tensor]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    with slurm(pair, tmp_path) as environment:
        found = trained(pair, [1, 1], "slurm", tmp_path, corpus, environment=environment)
    assert_same(found, one_host[backend_of("slurm")])


def test_the_batch_file_trains_on_two_hosts_of_slurm(
    pair: list[Host],
    one_host: dict[str, dict[str, torch.Tensor]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    words = trainer(tmp_path, corpus, backend_of("slurm"), f"checkpoint.every={STEPS}")
    with slurm(pair, tmp_path) as environment:
        command = ["sbatch", "--parsable", "--output", str(tmp_path / "log"), str(SBATCH), *words]
        variables = {**VARIABLES, **environment}
        job = pair[0].run(*command, environment=variables, folder=ROOT).stdout.strip()
        ended = ended_as(pair[0], job, environment)
        assert ended == "COMPLETED", (ended, (tmp_path / "log").read_text())
        assert not left_on(pair)
    assert_same(weights(tmp_path), one_host[backend_of("slurm")])


def test_the_comparison_notices_another_seed(
    pair: list[Host], one_host: dict[str, dict[str, torch.Tensor]], corpus: Path, tmp_path: Path
) -> None:
    words = trainer(tmp_path, corpus, backend_of("torchrun"), f"checkpoint.every={STEPS}")
    running = door(pair[0], tmp_path, "--slots", "2", *words, "--set", "optimizer.seed=1")
    assert running.code(LIMIT_S) == 0, running.text()[-8000:]
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path), one_host[backend_of("torchrun")])


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*DEEPSPEED, "mpirun")),
    ],
)
def test_three_hosts_with_unequal_slots_train_what_one_host_trains(
    launcher: str, corpus: Path, tmp_path: Path
) -> None:
    """Four processes on slots 1, 2 and 1, as on one host."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    alone.mkdir()
    spread.mkdir()
    with hosts(3) as on:
        found = trained(on, [1, 2, 1], launcher, spread, corpus)
        expected = trained(
            on[:1], [4], launcher, alone, corpus, ("--launcher", launcher, "--slots", "4")
        )
    assert_same(found, expected)


@pytest.mark.slow
def test_three_hosts_of_slurm_train_what_one_host_trains(corpus: Path, tmp_path: Path) -> None:
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    alone.mkdir()
    spread.mkdir()
    of_three = ("train.global_batch=6",)  # 3 processes x micro-batches of 2
    with hosts(3) as on:
        with slurm(on, tmp_path) as environment:
            found = trained(
                on, [1, 1, 1], "slurm", spread, corpus, environment=environment, more=of_three
            )
        one = ("--launcher", "torchrun", "--slots", "3")
        expected = trained(on[:1], [3], "torchrun", alone, corpus, one, more=of_three)
    assert_same(found, expected)


def test_mpirun_by_hand_needs_no_address(
    pair: list[Host],
    one_host: dict[str, dict[str, torch.Tensor]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    """mpirun says who a process is; where process 0 listens comes by mpi4py."""
    words = trainer(tmp_path, corpus, backend_of("mpirun"), f"checkpoint.every={STEPS}")
    mpirun = ["mpirun", "--allow-run-as-root", "-np", "2", "--host", "node1:1,node2:1"]
    mpirun += ["--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0"]
    exports = {**VARIABLES, "GLOO_SOCKET_IFNAME": "eth0"}
    mpirun += [word for name in exports for word in ("-x", name)]
    done = pair[0].run(
        *mpirun,
        sys.executable,
        *words,
        environment=exports,
        folder=ROOT,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    assert_same(weights(tmp_path), one_host[backend_of("mpirun")])

# SPDX-License-Identifier: Apache-2.0
"""The doctor's command line, and the checked values of it."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from flora_dist.cluster.doctor.host_facts import env_lines
from flora_dist.cluster.doctor.survey import Asked
from flora_dist.cluster.launch.commands import LAUNCHERS
from flora_dist.cluster.launch.hosts import (
    THIS_MACHINE,
    Host,
    address_of,
    check_name,
    check_port,
    read_hostfile,
    read_nodes,
)
from flora_dist.cluster.launch.variables import exported, own_file
from flora_dist.world import DEFAULT_PORT, interface_toward, interfaces

_WITH_MPI = frozenset(("openmpi", "mpirun"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The doctor's options."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hostfile", type=Path, help="one 'name slots=N' a line; without: this machine"
    )
    where.add_argument("--nodes", metavar="NAME[:SLOTS],...", help="the same in one word")
    parser.add_argument(
        "--slots", type=int, default=1, metavar="N", help="processes a host without a number (1)"
    )
    parser.add_argument(
        "--interface", metavar="NAME", help="network interface of every rank (GLOO, NCCL)"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the run's YAML or JSON: hosts must read the same"
    )
    parser.add_argument("--seed", type=int, help="of the projections that ranks compare")
    parser.add_argument(
        "--launcher",
        choices=sorted(LAUNCHERS),
        help="how the job will start; Open MPI needs mpi4py",
    )
    parser.add_argument(
        "--minimum", type=float, metavar="MBIT",
        help="10^6 bits per second that every link must have; without: a fifth of the fastest",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="start no ranks")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S",
        help="seconds in which ranks must find each other (60)",
    )  # fmt: skip
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter on every host (this one)"
    )
    parser.add_argument("--master-addr", metavar="ADDRESS", help="of process 0")
    parser.add_argument(
        "--master-port", type=int, metavar="PORT",
        default=DEFAULT_PORT, help=f"of process 0 ({DEFAULT_PORT})",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def checked(parsed: argparse.Namespace) -> Asked:
    """What was asked, checked.

    Raises:
        ValueError: a hostfile, list or number that cannot be.
    """
    hosts = _hosts(parsed)
    _check(parsed)
    folder = str(Path.cwd())
    environment = exported(os.environ, ())
    folders = [Path.home(), Path(folder)]
    with suppress(ValueError):  # a rule names the line: it is what the doctor is asked to find
        environment |= own_file(folders, os.environ)
    if parsed.interface is not None:
        environment |= {
            "GLOO_SOCKET_IFNAME": parsed.interface,
            "NCCL_SOCKET_IFNAME": parsed.interface,
        }
    return Asked(
        hosts=hosts,
        master=parsed.master_addr or _master(hosts),
        port=parsed.master_port,
        python=parsed.python,
        folder=folder,
        lines=env_lines(folders, os.environ),
        environment=environment,
        config=parsed.config,
        seed=parsed.seed,
        mpi=parsed.launcher in _WITH_MPI,
        minimum_mbit=parsed.minimum,
        timeout_s=parsed.timeout,
        ranks=not parsed.quick,
    )


def _hosts(parsed: argparse.Namespace) -> tuple[Host, ...]:
    if parsed.slots < 1:
        raise ValueError(f"--slots must be a whole number from 1; it is {parsed.slots}. Raise it.")
    if parsed.hostfile is not None:
        return read_hostfile(parsed.hostfile)
    if parsed.nodes is not None:
        return read_nodes(parsed.nodes, parsed.slots)
    return (Host(name=THIS_MACHINE, slots=parsed.slots),)


def _check(parsed: argparse.Namespace) -> None:
    if parsed.master_addr is not None:
        check_name(parsed.master_addr, "--master-addr")
    for name, value in (("--timeout", parsed.timeout), ("--minimum", parsed.minimum)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0; it is {value:g}. Raise it.")
    check_port(parsed.master_port)
    if parsed.seed is not None and not -(1 << 63) <= parsed.seed < 1 << 63:
        raise ValueError(f"--seed must lie in [-2^63, 2^63); it is {parsed.seed}. Correct it.")


def _master(hosts: tuple[Host, ...]) -> str:
    """The first host's address as the others reach it."""
    if len(hosts) == 1:
        return "127.0.0.1"
    for name in (host.name for host in hosts):
        try:
            address = address_of(name)
        except ValueError:
            continue  # a finding names it
        if name == hosts[0].name and not ip_address(address).is_loopback:
            return address
        # Debian gives a host's own name 127.0.1.1: this machine, as another host sees it.
        own = interfaces().get(interface_toward(address) or "")
        if own is not None and not ip_address(own).is_loopback:
            return own
    return "127.0.0.1"

# SPDX-License-Identifier: Apache-2.0
"""The arguments of `flora-dist launch`, checked and turned into a job; and its --dry-run."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import uuid
from importlib.util import find_spec
from pathlib import Path

from flora_dist.cluster.launch.commands import HERE, LAUNCHERS, Job
from flora_dist.cluster.launch.hosts import (
    THIS_MACHINE,
    Host,
    address_of,
    are_this_machine,
    check_name,
    check_port,
    read_hostfile,
    read_nodes,
)
from flora_dist.cluster.launch.processes import MARK
from flora_dist.cluster.launch.variables import exported, held_back, is_secret, own_file
from flora_dist.world import DEFAULT_PORT, TIMEOUT, interface_toward

MOST_GRACE_S = 600
ELASTIC_RESTARTS = 10
_LOOPBACK = "127.0.0.1"
_DEEPSPEED = ("pdsh", "openmpi", "no_ssh")
_PACKAGES = {
    "pdsh": "pdsh",
    "ssh": "openssh-client",
    "mpirun": "openmpi-bin",
    "ompi_info": "openmpi-bin",
    "srun": "slurm-client",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add what `flora-dist launch` takes."""
    argument = parser.add_argument
    argument(
        "--launcher", choices=sorted(LAUNCHERS), default="torchrun", help="what starts the ranks"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="one 'name slots=N' a line; else this machine"
    )
    where.add_argument(
        "--nodes", metavar="LIST", help="names, with :N for their processes; slurm: how many"
    )
    argument("--slots", type=int, default=1, metavar="N", help="processes on each of --nodes (1)")
    argument("--master-addr", metavar="ADDRESS", help="of process 0 (that of the first host)")
    argument("--master-port", type=int, metavar="PORT", help=f"({DEFAULT_PORT}; one machine: free)")
    argument("--interface", metavar="NAME", help="network interface (the way to process 0)")
    argument("--export", action="append", default=[], metavar="NAME[=VALUE]", help="send it too")
    argument("--least-nodes", type=int, metavar="N", help="torchrun: go on with so many hosts")
    argument("--restarts", type=int, metavar="N", help="torchrun: start all again so often")
    argument("--timeout", type=float, metavar="MINUTES", help="of a rank's wait (10)")
    argument("--grace", type=float, default=30.0, metavar="S", help="after SIGTERM, to save (30)")
    argument("--dry-run", action="store_true", help="print the exact commands and start nothing")
    argument("-m", dest="module", action="store_true", help="PROGRAM is a module, as for python -m")
    argument("program", metavar="PROGRAM", help="the script, or after -m the module")
    rest = argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    rest.required = False  # else argparse names them too where PROGRAM is missing


def job_of(parsed: argparse.Namespace) -> Job:
    """What was asked, checked.

    Raises:
        ValueError: a mistake in it.
    """
    hosts = _hosts(parsed)
    _check(parsed, hosts)
    alone = are_this_machine(hosts)
    address = parsed.master_addr or _address(parsed.launcher, hosts)
    # The ranks of one machine meet where no other comes.
    meeting = _LOOPBACK if len(hosts) == 1 and not parsed.master_addr else address
    variables = exported(os.environ, parsed.export)
    if parsed.launcher in _DEEPSPEED:
        variables |= own_file((Path("~").expanduser(), Path()), os.environ)
    if parsed.interface:
        variables |= {
            "GLOO_SOCKET_IFNAME": parsed.interface,
            "NCCL_SOCKET_IFNAME": parsed.interface,
        }
    if parsed.timeout is not None:
        # DeepSpeed takes whole minutes.
        variables["DEEPSPEED_TIMEOUT"] = str(max(1, round(parsed.timeout)))
        variables[TIMEOUT] = str(parsed.timeout)
    name = uuid.uuid4().hex[:12]
    return Job(
        name=name,
        hosts=hosts,
        least_hosts=parsed.least_nodes or len(hosts),
        restarts=_restarts(parsed, hosts),
        program=(*(["-m"] if parsed.module else []), parsed.program, *parsed.arguments),
        address=meeting,
        port=parsed.master_port or (_free_port() if alone else DEFAULT_PORT),
        interface=parsed.interface or (None if alone else interface_toward(address)),
        variables={**variables, MARK: name},
        held_back=() if alone else tuple(held_back(os.environ, variables)),
    )


def check_program(job: Job) -> None:
    """Whether this machine, where it runs the job alone, has the script; others may have their own.

    Raises:
        ValueError: no such file.
    """
    program = job.program[0]
    if program == "-m" or not are_this_machine(job.hosts):
        return
    if Path(program).is_file() or Path(program, "__main__.py").is_file():  # as Python runs them
        return
    raise ValueError(
        f"PROGRAM must be a script, or -m and a module; {program!r} is none. Mend the path."
    )


def printed(job: Job, launcher: str) -> str:
    """The exact commands, as a shell would take them, and the files they read."""
    commands = LAUNCHERS[launcher](job)
    lines = []
    for name, text in commands.files.items():
        for place in (HERE,) if commands.here else commands.each:
            lines.append(f"# {job.folder(place) / name}:")
            lines += [f"#   {line}" for line in text.splitlines()]
    if commands.secrets:
        lines.append(f"# in a file on every host: {', '.join(commands.secrets)}")
    variables = {**job.variables, **commands.variables}
    settings = " ".join(["env", *(_setting(*each) for each in sorted(variables.items()))])
    if commands.here:
        lines.append(f"{settings} {shlex.join(commands.here)}")
    for host, command in commands.each.items():
        lines += [f"# on {host}:", f"{settings} {shlex.join(command)}"]
    return "".join(f"{line}\n" for line in lines)


def _setting(name: str, value: str) -> str:
    # The printed text may lie in a log for ever.
    return f'{name}="${name}"' if is_secret(name) else shlex.quote(f"{name}={value}")


def _hosts(parsed: argparse.Namespace) -> tuple[Host, ...]:
    if parsed.slots < 1:
        raise ValueError(
            "--slots must be the number of processes on a host, at least 1; it is "
            f"{parsed.slots}. Give one per GPU."
        )
    if parsed.hostfile is not None:
        return read_hostfile(parsed.hostfile)
    if parsed.nodes is None:
        return (Host(name=THIS_MACHINE, slots=parsed.slots),)
    if parsed.launcher == "slurm" and parsed.nodes.isdecimal() and int(parsed.nodes):
        return (Host(name="", slots=parsed.slots),) * int(parsed.nodes)
    return read_nodes(parsed.nodes, parsed.slots)


def _check(parsed: argparse.Namespace, hosts: tuple[Host, ...]) -> None:
    """Refuse what the launcher cannot do."""
    if parsed.master_addr is not None:
        check_name(parsed.master_addr, "--master-addr")
    if parsed.master_port is not None:
        check_port(parsed.master_port)
    for option in ("least_nodes", "restarts"):
        if getattr(parsed, option) is not None and parsed.launcher != "torchrun":
            raise ValueError(
                f"--{option.replace('_', '-')} is for an elastic job, which torchrun alone can "
                f"run; the launcher is {parsed.launcher}. Use --launcher torchrun."
            )
    least = parsed.least_nodes
    if least is not None and not 1 <= least <= len(hosts):
        raise ValueError(
            f"--least-nodes must lie between 1 and the number of hosts, {len(hosts)}; it is "
            f"{least}. Correct it."
        )
    if parsed.restarts is not None and parsed.restarts < 0:
        raise ValueError(f"--restarts must be 0 or more; it is {parsed.restarts}. Raise it.")
    if parsed.timeout is not None and not parsed.timeout > 0:
        raise ValueError(
            f"--timeout must be a number of minutes above 0; it is {parsed.timeout}. Raise it."
        )
    if not 0 <= parsed.grace <= MOST_GRACE_S:
        raise ValueError(
            f"--grace must be a number of seconds from 0 to {MOST_GRACE_S}; it is {parsed.grace}. "
            "Correct it."
        )
    if parsed.launcher == "slurm" and len({host.slots for host in hosts}) > 1:
        raise ValueError(
            "srun starts the same number of tasks on every host; the slots are "
            f"{', '.join(f'{host.name} {host.slots}' for host in hosts)}. Make them equal."
        )
    _check_tools(parsed.launcher, hosts)


def _check_tools(launcher: str, hosts: tuple[Host, ...]) -> None:
    alone = are_this_machine(hosts)
    needed = {
        "pdsh": () if alone else ("pdsh", "ssh"),
        "openmpi": ("mpirun", "ompi_info"),
        "mpirun": ("mpirun",),
        "slurm": ("srun",),
    }
    for tool in needed.get(launcher, () if alone else ("ssh",)):
        if shutil.which(tool) is None:
            raise ValueError(
                f"--launcher {launcher} needs the program {tool}, which is not on PATH. Install "
                f"it ({_PACKAGES[tool]} on Debian), or use another launcher."
            )
    if launcher in _DEEPSPEED and find_spec("deepspeed") is None:
        raise ValueError(
            f"--launcher {launcher} needs DeepSpeed, which is not installed. "
            "pip install 'flora-dist[deepspeed]', or use torchrun, mpirun or slurm."
        )


def _address(launcher: str, hosts: tuple[Host, ...]) -> str:
    """Of the first host, as the others reach it."""
    if launcher == "slurm" and not hosts[0].name:
        return ""  # Slurm chooses the hosts; each process reads their list
    if are_this_machine(hosts):
        return _LOOPBACK
    address = address_of(hosts[0].name)
    if len(hosts) > 1 and address.startswith("127."):
        raise ValueError(
            f"the other hosts must reach the first one; {hosts[0].name} is {address} here, which "
            "leads each host to itself. Correct /etc/hosts, or name an address: --master-addr."
        )
    return address


def _restarts(parsed: argparse.Namespace, hosts: tuple[Host, ...]) -> int:
    """As asked; an elastic job needs some."""
    if parsed.restarts is not None:
        return int(parsed.restarts)
    elastic = parsed.least_nodes is not None and parsed.least_nodes < len(hosts)
    # One loss may cost two: a generation that a dying host has joined fails at once (measured).
    return ELASTIC_RESTARTS if elastic else 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

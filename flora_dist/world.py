# SPDX-License-Identifier: Apache-2.0
"""Which process of how many this one is: the one reader of what launchers say in the environment.

torchrun, the deepspeed launcher, mpirun (Open MPI) and Slurm each say it in variables of their own.
Standard library only.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from ipaddress import ip_address

DEFAULT_PORT = 29500
"""Where process 0 listens if nobody says; torch's and DeepSpeed's own."""
TIMEOUT = "FLORA_TIMEOUT_MINUTES"
MARK = "FLORA_JOB"
"""Every process that `flora-dist launch` has started has the job's name in it."""
_LOOPBACK = "127.0.0.1"
_FIRST_PRIVATE_PORT, _PRIVATE_PORTS = 20000, 10000


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlace:
    """One process among those of a job."""

    process_rank: int
    size: int
    """Processes of the job."""
    local_rank: int
    """Of this process among those of its host."""
    local_size: int
    """Processes on this host."""
    address: str | None
    """Where process 0 listens; None where the launcher does not say (mpirun by itself)."""
    port: int
    launcher: str
    """torchrun, deepspeed, mpirun, slurm, variables (RANK and WORLD_SIZE set by hand) or none."""

    def variables(self) -> dict[str, str]:
        """The same in the names that torch and DeepSpeed read."""
        address = {} if self.address is None else {"MASTER_ADDR": self.address}
        return {
            "RANK": str(self.process_rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_PORT": str(self.port),
            **address,
        }


def read_world(environment: Mapping[str, str]) -> ProcessPlace:
    """The place that a launcher gave this process; alone where none did.

    torchrun's and DeepSpeed's own names come first: torchrun inside a Slurm step or under mpirun
    starts the processes that count. Slurm's count only inside a step (`srun`): the batch script
    itself sees those of a whole job.

    Raises:
        ValueError: variables that are missing, are no numbers or contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        place = _from_torch(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        place = _from_open_mpi(environment)
    elif environment.get("SLURM_STEP_ID", "").isdecimal() and "SLURM_PROCID" in environment:
        place = _from_slurm(environment)
    else:
        return ProcessPlace(
            process_rank=0, size=1, local_rank=0, local_size=1,
            address=None, port=DEFAULT_PORT, launcher="none",
        )  # fmt: skip
    _check(place)
    return place


def join(environment: MutableMapping[str, str]) -> ProcessPlace:
    """Give this process's environment torch's names for its place, and return the place.

    mpirun by itself does not say where process 0 listens: process 0 tells the others by mpi4py.

    Raises:
        ValueError: variables that are wrong (`read_world`), or mpi4py is needed and missing.
    """
    place = read_world(environment)
    if place.launcher in {"mpirun", "slurm"}:
        if place.address is None:
            address, port = _told_by_mpi(place)
            place = replace(place, address=address, port=port)
        environment.update(place.variables())
    return place


def timeout_minutes(environment: Mapping[str, str]) -> float | None:
    """How long a process may wait for others, as `flora-dist launch --timeout` says it."""
    text = environment.get(TIMEOUT)
    return None if text is None else float(text)


def _told_by_mpi(place: ProcessPlace) -> tuple[str, int]:
    """An address and a free port of process 0, as MPI brings them."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            "mpirun does not say where process 0 listens, and mpi4py, which would know, cannot "
            f"be imported ({error}). pip install 'flora-dist[mpi]', or name the address: mpirun "
            "-x MASTER_ADDR=ADDRESS."
        ) from None
    found = None
    if place.process_rank == 0:
        own = [address for name, address in sorted(interfaces().items()) if name != "lo"]
        is_alone = place.local_size == place.size
        address = _LOOPBACK if is_alone or not own else own[0]
        with socket.socket() as listener:
            listener.bind((address, 0))
            found = (address, int(listener.getsockname()[1]))
    told: tuple[str, int] = MPI.COMM_WORLD.bcast(found, root=0)
    return told


def first_of(nodes: str) -> str:
    """The first host of Slurm's short form.

    >>> first_of("gpu[07-09,12],login1"), first_of("a1-b[3]"), first_of("node1,node2")
    ('gpu07', 'a1-b3', 'node1')
    """
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if match is None:
        raise ValueError(
            f"SLURM_JOB_NODELIST must begin with a host; it is {nodes!r}. Set MASTER_ADDR instead."
        )
    return match[1] + (match[2] or "")


def is_of_this_machine(address: str | None) -> bool:
    """Whether an address leads each machine to itself: a job that meets there has one machine."""
    try:
        return address is not None and ip_address(socket.gethostbyname(address)).is_loopback
    except OSError:
        return False


def listen_at(address: str, port: int) -> socket.socket:
    """A socket that listens at one address alone.

    torch's store listens at all addresses of a machine, to everybody who reaches it, unless it is
    given a socket.

    Raises:
        ValueError: another program has the port.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"process 0 needs a port of its own; {address}:{port} cannot be opened "
            f"({error.strerror}). Name another: --master-port, or MASTER_PORT."
        ) from None
    return listening


def interface_toward(address: str) -> str | None:
    """The network interface by which this host reaches an address, or that has it.

    None where there is no route. Without an interface gloo resolves the host's own name, for which
    Debian's /etc/hosts says 127.0.1.1: processes then wait for each other until they time out.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # no packet is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for name, has in interfaces().items() if has == own), None)


def interfaces() -> dict[str, str]:
    """Names of this host's network interfaces with their IPv4 addresses."""
    import fcntl  # Linux; the rest of the module is read elsewhere too

    get_address = 0x8915  # SIOCGIFADDR
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = name.encode()[:15].ljust(256, b"\0")
            try:
                answer = fcntl.ioctl(asked.fileno(), get_address, request)
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _from_torch(environment: Mapping[str, str]) -> ProcessPlace:
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = "torchrun"
    elif "CROSS_RANK" in environment:  # since DeepSpeed 0.8: the rank of its host
        launcher = "deepspeed"
    else:
        launcher = "variables"
    process_rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_size = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environment), None)
    local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0
    return ProcessPlace(
        process_rank=process_rank,
        size=size,
        local_rank=local_rank,
        local_size=_number(environment, local_size) if local_size else local_rank + 1,
        address=environment.get("MASTER_ADDR"),
        port=_port(environment, DEFAULT_PORT),
        launcher=launcher,
    )


def _from_open_mpi(environment: Mapping[str, str]) -> ProcessPlace:
    prefix = "OMPI_COMM_WORLD_"
    return ProcessPlace(
        process_rank=_number(environment, f"{prefix}RANK"),
        size=_number(environment, f"{prefix}SIZE"),
        local_rank=_number(environment, f"{prefix}LOCAL_RANK"),
        local_size=_number(environment, f"{prefix}LOCAL_SIZE"),
        address=environment.get("MASTER_ADDR"),
        port=_port(environment, DEFAULT_PORT),
        launcher="mpirun",
    )


def _from_slurm(environment: Mapping[str, str]) -> ProcessPlace:
    process_rank, local_rank = (
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_LOCALID"),
    )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job = _number(environment, "SLURM_JOB_ID")
    # Two jobs may share a host: each has a port of its own.
    port = _FIRST_PRIVATE_PORT + job % _PRIVATE_PORTS
    per_host = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    local_size = _tasks_here(per_host, _number(environment, "SLURM_NODEID"), local_rank)
    first = _LOOPBACK if local_size == size else first_of(nodes)
    return ProcessPlace(
        process_rank=process_rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=environment.get("MASTER_ADDR") or first,
        port=_port(environment, port),
        launcher="slurm",
    )


def _tasks_here(per_host: str, host: int, local_rank: int) -> int:
    """From Slurm's short form.

    >>> [_tasks_here("2(x3),1", host, 0) for host in range(4)]
    [2, 2, 2, 1]
    """
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_host):
        counts += [int(tasks)] * int(times or 1)
    return counts[host] if host < len(counts) else local_rank + 1


def _port(environment: Mapping[str, str], default: int) -> int:
    return _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else default


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise ValueError(
            f"a launcher must set all of its variables; {name} is missing beside "
            f"{', '.join(sorted(set(environment) & _KNOWN))}. Start with torchrun, deepspeed, "
            "mpirun or srun, or unset the others."
        )
    if not text.isdecimal():
        raise ValueError(
            f"{name} must be a whole number from 0; it is {text!r}. Start with torchrun, "
            "deepspeed, mpirun or srun, or correct it."
        )
    return int(text)


_KNOWN = frozenset(
    (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"),
        *("SLURM_JOB_ID", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    )
)


def _check(place: ProcessPlace) -> None:
    if not place.process_rank < place.size:
        raise ValueError(
            f"a process's rank must be below the number of processes; {place.launcher} says rank "
            f"{place.process_rank} of {place.size}. Correct RANK and WORLD_SIZE, or their "
            "launcher."
        )

# SPDX-License-Identifier: Apache-2.0
"""The exact commands by which each launcher starts a job; nothing runs here."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flora_dist.cluster.launch.hosts import Host, are_this_machine
from flora_dist.cluster.launch.processes import MARK
from flora_dist.cluster.launch.ssh import OPTIONS
from flora_dist.cluster.launch.variables import as_file, is_secret
from flora_dist.cluster.launch.worker import FOLDERS, MODULE, encode
from flora_dist.world import is_of_this_machine

HERE = "front"
"""Where the front door runs."""
JOIN_S = 60
"""Seconds in which the agents of torchrun wait for each other; torch's default is 600."""
LAST_CALL_S = 5
"""Seconds in which an elastic job waits for more hosts than it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to run where."""

    name: str
    """Marks its processes."""
    hosts: tuple[Host, ...]
    least_hosts: int
    """Below the number of hosts: an elastic job goes on with so many (torchrun)."""
    restarts: int
    """How often torchrun starts all workers again after one has failed."""
    program: tuple[str, ...]
    """Words for Python: a script or -m MODULE, and arguments."""
    address: str
    """Where process 0 listens."""
    port: int
    interface: str | None
    """Of the first host toward the others; for Open MPI's own messages."""
    variables: Mapping[str, str]
    """For every process."""
    held_back: tuple[str, ...] = ()
    """Names of those that other hosts are not sent, as they look like secrets."""

    def folder(self, where: str) -> Path:
        """Where its files are meanwhile: on a host of that name, or HERE."""
        # By host: containers may share the folder for temporary files.
        return Path(f"{self.folders}{where}")

    @property
    def folders(self) -> str:
        """What their paths begin with."""
        return str(Path(tempfile.gettempdir()) / f"flora-{self.name}-")

    @property
    def size(self) -> int:
        """Processes."""
        return sum(host.slots for host in self.hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """How a launcher starts a job: one command here, or one on each host."""

    here: tuple[str, ...] = ()
    each: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By the host's name."""
    stop: tuple[str, ...] = ()
    """Asks the ranks to save and end, where no agents can."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """For the command, over those of the job."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Texts that must exist meanwhile in the job's folder, here or on each host, by name."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Variables that the launcher would put on command lines, where every user of a host reads
    them: they go to each host's folder."""


def pdsh(job: Job) -> Commands:
    """The deepspeed launcher over pdsh and ssh."""
    options = () if are_this_machine(job.hosts) else ("--force_multi", "--launcher", "pdsh")
    ssh = " ".join(OPTIONS)
    # Without keepalive the launcher waits forever for the ssh to a host that is gone (measured).
    return _deepspeed(job, options, {"PDSH_SSH_ARGS_APPEND": ssh})


def openmpi(job: Job) -> Commands:
    """The deepspeed launcher over Open MPI's mpirun."""
    # DeepSpeed names eth0 unless its arguments name an interface.
    name = ["--mca", "btl_tcp_if_include", job.interface or "lo"]
    options = ("--force_multi", "--launcher", "openmpi", "--launcher_args", shlex.join(name))
    return _deepspeed(job, options, _open_mpi(job), _meeting(job))


def no_ssh(job: Job) -> Commands:
    """The deepspeed launcher once on each host, which starts the processes there alone."""
    each = {}
    for rank, host in enumerate(job.hosts):
        options = ("--no_ssh", "--node_rank", str(rank))
        each[host.name] = _runner(job, job.folder(host.name), options)
    return Commands(each=each, files={_HOSTFILE: _hostfile(job)})


def torchrun(job: Job) -> Commands:
    """Torchrun once on each host, which meet at the first."""
    most = len(job.hosts)
    nodes = str(most) if job.least_hosts == most else f"{job.least_hosts}:{most}"
    conf = f"join_timeout={JOIN_S},last_call_timeout={LAST_CALL_S}"
    meeting, files, variables = f"{job.address}:{job.port}", {}, {}
    if is_of_this_machine(job.address):
        # A file: torchrun unpickles what it finds at the meeting point, and its port would listen
        # to everybody. Nor does it keep a store for the ranks, whose own is `meet_here`'s.
        conf += ",store_type=file"
        meeting, files = str(job.folder(job.hosts[0].name) / _MEETING), {_MEETING: ""}
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    each = {}
    for host in job.hosts:
        each[host.name] = (
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", nodes, "--nproc-per-node", str(host.slots)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", meeting),
            *("--rdzv-id", job.name, "--rdzv-conf", conf),
            # Else it tells the others this host's own name, which need not resolve there.
            *("--local-addr", job.address if host is job.hosts[0] else host.name),
            *("--max-restarts", str(job.restarts)),
            *("-m", MODULE, *encode(job.program)),
        )
    return Commands(each=each, files=files, variables=variables)


def mpirun(job: Job) -> Commands:
    """Open MPI's mpirun, without DeepSpeed."""
    hosts = ",".join(f"{host.name}:{host.slots}" for host in job.hosts)
    given = {**job.variables, **_meeting(job)}
    exports = [word for name in sorted(given) for word in ("-x", name)]
    command = ("mpirun", "-np", str(job.size), "--host", hosts, *exports, *_worker(job))
    return Commands(here=command, variables={**_meeting(job), **_open_mpi(job)})


def slurm(job: Job) -> Commands:
    """Slurm's srun: one task is one process. Inside an allocation it takes that one."""
    slots = job.hosts[0].slots
    names = [host.name for host in job.hosts if host.name]
    command = (
        *("srun", "--nodes", str(len(job.hosts)), "--ntasks", str(job.size)),
        *("--ntasks-per-node", str(slots)),
        *(("--nodelist", ",".join(names)) if names else ()),
        *("--job-name", _slurm_name(job)),
        # One that fails ends the others, which would wait for it.
        *("--kill-on-bad-exit=1", "--export", "ALL"),
        *_worker(job),
    )
    # srun itself ends the tasks at once at a SIGTERM: they could not save.
    own = os.environ.get("SLURM_JOB_ID")
    return Commands(
        here=command,
        stop=("scancel", "--signal=TERM", *((own,) if own else ("--name", _slurm_name(job)))),
        variables=_meeting(job) if job.address else {},
    )


LAUNCHERS: dict[str, Callable[[Job], Commands]] = {
    "pdsh": pdsh,
    "openmpi": openmpi,
    "no_ssh": no_ssh,
    "torchrun": torchrun,
    "mpirun": mpirun,
    "slurm": slurm,
}
_HOSTFILE, _VARIABLES, _MEETING = "hostfile", "deepspeed_env", "meeting"


def _deepspeed(
    job: Job,
    options: tuple[str, ...],
    variables: Mapping[str, str],
    exports: Mapping[str, str] | None = None,
) -> Commands:
    files = job.folder(HERE)
    secrets = {name: value for name, value in job.variables.items() if is_secret(name)}
    shown = {name: value for name, value in job.variables.items() if name not in secrets}
    if secrets:
        shown[FOLDERS] = job.folders
    text = as_file({**shown, **(exports or {})})
    return Commands(
        here=_runner(job, files, options),
        # DeepSpeed joins this to the folders it looks in, and an absolute path stays what it is.
        variables={**variables, "DS_ENV_FILE": str(files / _VARIABLES)},
        files={_HOSTFILE: _hostfile(job), _VARIABLES: text},
        secrets=secrets,
    )


def _runner(job: Job, files: Path, options: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(files / _HOSTFILE)),
        # Without it: the first address of the first host, wrong where it has several.
        *("--master_addr", job.address, "--master_port", str(job.port)),
        # The ranks read their place in the environment; scripts need not know --local_rank. The
        # hosts have been reached already.
        *("--no_local_rank", "--no_ssh_check", *options),
        *("--module", MODULE, *encode(job.program)),
    )


def _slurm_name(job: Job) -> str:
    return f"flora-{job.name}"


def _worker(job: Job) -> tuple[str, ...]:
    return (sys.executable, "-u", "-m", MODULE, *encode(job.program))


def _hostfile(job: Job) -> str:
    return "".join(f"{host.name} slots={host.slots}\n" for host in job.hosts)


def _meeting(job: Job) -> dict[str, str]:
    """Mpirun and srun say who a process is, not where process 0 listens."""
    return {"MASTER_ADDR": job.address, "MASTER_PORT": str(job.port)}


def _open_mpi(job: Job) -> dict[str, str]:
    """Open MPI's settings, for its mpirun however it is started."""
    settings = {
        # A host that is gone: noticed after 5 + 3 x 2 s; without, mpirun hangs (measured).
        "oob_tcp_keepalive_time": "5",
        "oob_tcp_keepalive_intvl": "2",
        "oob_tcp_keepalive_probes": "3",
        "plm_rsh_args": " ".join(OPTIONS),
        # Its daemons on other hosts carry the job's mark too.
        "orte_launch_agent": f"env {MARK}={job.name} orted",
        # By default each process is bound to one core: torch's threads would share it.
        "hwloc_base_binding_policy": "none",
        "btl": "^openib",
    }
    interface = "lo" if are_this_machine(job.hosts) else job.interface
    if interface is not None:
        settings["oob_tcp_if_include"] = settings["btl_tcp_if_include"] = interface
    found = {f"OMPI_MCA_{name}": value for name, value in settings.items()}
    if os.geteuid() == 0:  # in containers; it refuses otherwise
        found |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return found

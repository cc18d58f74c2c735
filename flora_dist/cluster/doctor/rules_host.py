# SPDX-License-Identifier: Apache-2.0
"""Rules on a host's means: GPUs against slots, shared memory, limits, room, clock, folder."""

from __future__ import annotations

from collections.abc import Iterator

from flora_dist.cluster.doctor.survey import Finding, Survey, error, groups, warning

_MIB, _GIB = 1 << 20, 1 << 30
# DeepSpeed 0.19, csrc/cpu/comm/shm.cpp: one buffer of 2 x 1 MiB + 2 x 32 MiB for each process.
_SHM_PER_RANK = 66 * _MIB
# Docker's own size; NCCL takes about 33 MiB a GPU, data loaders more.
_SHM_DOCKER = 64 * _MIB
_FILES = 1024
_ROOM = 1 * _GIB
_CLOCK_S = 2.0
"""Torch's rendezvous and make-like builds on shared folders compare times of hosts."""


def slots_fit_gpus(survey: Survey) -> Iterator[Finding]:
    """One process a GPU: a second one on the same GPU makes NCCL fail."""
    slots = {host.name: host.slots for host in survey.asked.hosts}
    for host in survey.facts:
        if host.gpus and slots[host.name] > len(host.gpus):
            yield error(
                "slots", [host.name],
                f"{host.name} has {slots[host.name]} slots and {len(host.gpus)} GPUs",
                f"Write slots={len(host.gpus)} for {host.name} in the hostfile.",
            )  # fmt: skip
        elif not host.gpus and slots[host.name] > host.cpus:
            yield warning(
                "slots", [host.name],
                f"{host.name} has {slots[host.name]} slots and {host.cpus} CPU cores, no GPU",
                f"Write slots={host.cpus} or fewer for {host.name}.",
            )  # fmt: skip


def gpus_agree(survey: Survey) -> Iterator[Finding]:
    """Drivers and kinds; a host without any among hosts that have some."""
    for host in survey.facts:
        if host.gpu_trouble is not None:
            yield error(
                "gpu", [host.name], f"nvidia-smi fails on {host.name}: {host.gpu_trouble}",
                "Repair the driver (a reboot after its update); in a container ask for GPUs.",
            )  # fmt: skip
    without = [host.name for host in survey.facts if not host.gpus]
    if without and len(without) < len(survey.facts):
        yield error(
            "gpu", without, f"no GPU on {', '.join(without)}, but on other hosts",
            "Leave these hosts out, or repair their driver (nvidia-smi must list GPUs).",
        )  # fmt: skip
    with_some = [host for host in survey.facts if host.gpus]
    kinds = {host.name: ", ".join(sorted({g.name for g in host.gpus})) for host in with_some}
    if differ := groups(kinds):
        yield warning(
            "gpu", differ[1], f"GPUs differ: {differ[0]}", "The slowest sets the pace of all."
        )
    drivers = {host.name: host.gpus[0].driver for host in with_some}
    if differ := groups(drivers):
        yield warning(
            "gpu", differ[1], f"GPU drivers differ: {differ[0]}", "Install one driver everywhere."
        )


def shared_memory_suffices(survey: Survey) -> Iterator[Finding]:
    """/dev/shm holds DeepSpeed's buffers on CPUs, NCCL's on GPUs, and data loaders' batches."""
    slots = {host.name: host.slots for host in survey.asked.hosts}
    for host in survey.facts:
        size = host.limits.shm_bytes
        what = f"/dev/shm of {host.name} has {size / _MIB:.0f} MiB"
        remedy = "docker run --shm-size 2g, or mount -o remount,size=2g /dev/shm"
        helper = "deepspeed" in host.packages and not host.gpus and slots[host.name] > 1
        needed = slots[host.name] * _SHM_PER_RANK
        if helper and size < needed:
            need = f"DeepSpeed's helper for CPUs needs {needed / _MIB:.0f} for its processes"
            yield error("shm", [host.name], f"{what}; {need}", remedy)
        elif size <= _SHM_DOCKER:
            yield warning(
                "shm", [host.name], f"{what}: NCCL and data loaders may run out of it", remedy
            )


def limits_suffice(survey: Survey) -> Iterator[Finding]:
    """Open files, and locked memory where InfiniBand is: RDMA pins what it sends."""
    for host in survey.facts:
        if host.limits.open_files < _FILES:
            yield warning(
                "limits", [host.name],
                f"{host.name} allows {host.limits.open_files} open files, below {_FILES}",
                "Raise nofile in /etc/security/limits.conf, or docker run --ulimit nofile=65536",
            )  # fmt: skip
        if host.network.infiniband and host.limits.locked_bytes is not None:
            yield warning(
                "limits", [host.name],
                f"{host.name} has InfiniBand but allows only {host.limits.locked_bytes} bytes of "
                "locked memory: NCCL cannot register its buffers",
                "Set memlock unlimited in limits.conf, or docker run --ulimit memlock=-1",
            )  # fmt: skip


def disk_has_room(survey: Survey) -> Iterator[Finding]:
    """Checkpoints go to the working directory."""
    for host in survey.facts:
        if host.limits.free_bytes < _ROOM:
            yield warning(
                "disk", [host.name],
                f"the working directory of {host.name} has "
                f"{host.limits.free_bytes / _MIB:.0f} MiB left",
                "Make room there, or start the job elsewhere.",
            )  # fmt: skip


def folder_exists(survey: Survey) -> Iterator[Finding]:
    """Launchers change to the folder in which they were called."""
    for host in survey.facts:
        if host.folder is None:
            yield error(
                "folder", [host.name],
                f"the working directory {survey.asked.folder} does not exist on {host.name}",
                f"Make it there (mkdir -p {survey.asked.folder}), or share it between hosts.",
            )  # fmt: skip


def clocks_agree(survey: Survey) -> Iterator[Finding]:
    """By more than what the question itself took."""
    for host in survey.facts:
        if abs(host.clock_ahead_s) > _CLOCK_S + host.clock_doubt_s:
            way = "ahead" if host.clock_ahead_s > 0 else "behind"
            yield warning(
                "clock", [host.name],
                f"the clock of {host.name} is {abs(host.clock_ahead_s):.1f} s {way}",
                "Run chrony or systemd-timesyncd there: files on shared folders seem newer "
                "or older than they are, and are built again or not at all.",
            )  # fmt: skip

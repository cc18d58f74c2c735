# SPDX-License-Identifier: Apache-2.0
"""Several "hosts" on this machine: namespaces of their own, joined by a switch, each with sshd.

Each has its own network, host name, process ids, mounts and shared memory. Nothing is created in
the machine's own network namespace, and the kernel takes everything away when this process ends,
however it ends. A process namespace is needed, not cosmetic: DeepSpeed's pdsh launcher answers a
signal with `pkill -f` on every host. Needs root, Linux, util-linux, iproute2 and openssh-server.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NETWORK = "10.77.0"
WAIT_SECONDS = 15.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SMALLEST_BURST = 64 << 10
"""Bytes that pass unshaped; one packet of the kernel's segmentation must fit."""
LARGEST_MBIT = 200
"""Faster links need a larger burst: rate / 250 ticks per second, at least."""
NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid")

# PID 1 of a host. A fresh /sys, as the machine's own would show its interfaces; the home folder is
# a layer over the machine's (whose Python may live there), so that each host writes its own.
INIT = r"""
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
mount --bind "$HOSTS_DIR/etc_hosts" /etc/hosts
mount -t tmpfs tmpfs /mnt && mkdir /mnt/upper /mnt/work
mount -t overlay overlay -o lowerdir=/root,upperdir=/mnt/upper,workdir=/mnt/work /root
rm -rf /root/.bashrc /root/.ssh && mkdir -m 700 /root/.ssh
cp "$HOSTS_DIR"/ssh/* /root/.ssh/ && chmod 600 /root/.ssh/*
hostname "$NAME"
ip link set lo up
echo ready > "$HOSTS_DIR/$NAME.ready"
while ! ip -o addr show eth0 2>/dev/null | grep -q inet; do sleep 0.02; done
/usr/sbin/sshd -f "$HOSTS_DIR/sshd_config" -E "$HOSTS_DIR/$NAME.sshd.log"
echo up > "$HOSTS_DIR/$NAME.up"
trap : CHLD
while :; do sleep 3600 & wait; done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One of them; ``name`` is its host name, which every other resolves to ``address``."""

    name: str
    address: str
    pid: int
    """Its first process, as the machine counts."""
    namespace: Path
    """Its process namespace, as /proc shows it."""
    switch: int
    """The process that holds the switch."""
    port: str
    """The switch's end of its cable."""

    def argv(self, *command: str | Path, folder: Path | None = None) -> list[str]:
        """``command`` as it is started there."""
        enter = ["nsenter", "-t", str(self.pid), *NAMESPACES]
        place = [f"--wd={folder}"] if folder else []
        return [*enter, *place, "--", *map(str, command)]

    def run(
        self,
        *command: str | Path,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        timeout: float = 120.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` there to its end; its output is read."""
        return subprocess.run(
            self.argv(*command, folder=folder),
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )

    def start(
        self,
        *command: str | Path,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start ``command`` there. nsenter passes no signal on: use `signal_all`."""
        options.setdefault("stdin", subprocess.DEVNULL)
        argv = self.argv(*command, folder=folder)
        return subprocess.Popen(argv, env=_environment(environment), **options)

    def commands(self) -> dict[int, list[str]]:
        """Command lines of what runs there, by the machine's process ids; not init and sshd."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == self.pid:
                continue
            try:
                if (folder / "ns/pid").readlink() != self.namespace:
                    continue
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if words[0] not in {"", "sleep"} and not words[0].startswith(
                ("sshd", "/usr/sbin/sshd")
            ):
                found[int(folder.name)] = words[:-1]
        return found

    def signal_all(self, wanted: Callable[[list[str]], bool], number: signal.Signals) -> int:
        """Signal the processes there whose command line is wanted; how many."""
        pids = [pid for pid, words in self.commands().items() if wanted(words)]
        for pid in pids:
            os.kill(pid, number)
        return len(pids)

    def shape(self, mbit: int | None) -> None:
        """Limit both ways of its cable to so many million bits per second; None: no limit."""
        if mbit is None:
            return
        assert mbit <= LARGEST_MBIT, f"a burst of {SMALLEST_BURST} bytes is too small for {mbit}"
        limit = ("tbf", "rate", f"{mbit}mbit", "burst", str(SMALLEST_BURST), "latency", "50ms")
        for pid, device in ((self.pid, "eth0"), (self.switch, self.port)):
            _in_network(pid, "tc", "qdisc", "replace", "dev", device, "root", *limit)

    def cable(self, state: str) -> None:
        """Plug its cable in ("up") or pull it ("down"): nobody is told."""
        _in_network(self.switch, "ip", "link", "set", self.port, state)

    def power_off(self) -> None:
        """End everything there at once; the cable is pulled first, so that no peer is told."""
        self.cable("down")
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def hosts(count: int, *, mbit: int | None = None) -> Iterator[list[Host]]:
    """So many hosts, node1 to nodeN, which reach each other by ssh without a question.

    Raises:
        PermissionError: not root.
        RuntimeError: a host could not be made; it holds what its first process said.
    """
    if os.geteuid() != 0:
        raise PermissionError("hosts of their own need namespaces; run this as root.")
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    names = [f"node{number}" for number in range(1, count + 1)]
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
    holders: list[subprocess.Popen[bytes]] = []
    try:
        _write_files(folder, addresses)
        switch = _hold(["--net"], "exec sleep infinity", {})
        holders.append(switch)
        switch_pid = _switch_ready(switch)
        made = []
        for name in names:
            environment = {"HOSTS_DIR": str(folder), "NAME": name, "PATH": PATH}
            holder = _hold([*NAMESPACES, "--fork", "--kill-child"], INIT, environment)
            holders.append(holder)
            made.append(_plug(folder, holder, name, addresses[name], switch_pid))
        for host, holder in zip(made, holders[1:], strict=True):
            _wait(folder, holder, (folder / f"{host.name}.up").exists)
            host.shape(mbit)
        yield made
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    """What a login there would have, not what this machine's session has."""
    base = {"PATH": PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8"}
    return {**base, **(more or {})}


def _write_files(folder: Path, addresses: dict[str, str]) -> None:
    ssh = folder / "ssh"
    ssh.mkdir()
    lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in addresses.items())]
    (folder / "etc_hosts").write_text("\n".join(lines) + "\n")
    for key in (ssh / "id_ed25519", folder / "hostkey"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    host_key = " ".join((folder / "hostkey.pub").read_text().split()[:2])
    known = "".join(f"{name},{ip} {host_key}\n" for name, ip in addresses.items())
    (ssh / "known_hosts").write_text(known)
    (folder / "sshd_config").write_text(
        f"Port 22\nHostKey {folder}/hostkey\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPidFile /run/sshd.pid\n"
        "MaxStartups 100:30:200\nUseDNS no\n"
    )


def _hold(
    namespaces: Sequence[str], script: str, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Keeps namespaces; dies with this process, and takes all that runs there with it."""
    command = ["unshare", *namespaces, "bash", "-c", script]
    log = Path(environment["HOSTS_DIR"]) / f"{environment['NAME']}.log" if environment else None
    with Path(log or os.devnull).open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment or {"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _switch_ready(switch: subprocess.Popen[bytes]) -> int:
    own = Path("/proc/self/ns/net").readlink()
    _wait(None, switch, lambda: Path(f"/proc/{switch.pid}/ns/net").readlink() != own)
    bridge = ("ip", "link", "add", "switch", "type", "bridge", "forward_delay", "0")
    _in_network(switch.pid, *bridge)
    _in_network(switch.pid, "ip", "link", "set", "switch", "up")
    return switch.pid


def _plug(
    folder: Path, holder: subprocess.Popen[bytes], name: str, address: str, switch: int
) -> Host:
    """Join a host to the switch."""
    _wait(folder, holder, (folder / f"{name}.ready").exists)
    pid = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
    port = f"to-{name}"
    peer = ("type", "veth", "peer", "name", port, "netns", str(switch))
    _in_network(pid, "ip", "link", "add", "eth0", *peer)
    _in_network(switch, "ip", "link", "set", port, "master", "switch", "up")
    _in_network(pid, "ip", "link", "set", "eth0", "up")
    _in_network(pid, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    namespace = Path(f"/proc/{pid}/ns/pid").readlink()
    return Host(name=name, address=address, pid=pid, namespace=namespace, switch=switch, port=port)


def _in_network(pid: int, *command: str) -> None:
    _run("nsenter", "-t", str(pid), "--net", "--", *command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _wait(folder: Path | None, holder: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not ready():
        said = "" if folder is None else "".join(p.read_text() for p in folder.glob("*.log"))
        if holder.poll() is not None:
            raise RuntimeError(f"a host ended with {holder.returncode}: {said}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"a host was not ready after {WAIT_SECONDS:.0f} s: {said}")
        time.sleep(0.01)

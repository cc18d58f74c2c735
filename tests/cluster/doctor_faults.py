# SPDX-License-Identifier: Apache-2.0
"""Faults that are really planted on a host, and taken away again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.cluster.hosts import Host
from tests.harness.launched import ROOT

SITE = Path(sysconfig.get_path("purelib"))
LIBRARY = Path(sysconfig.get_path("stdlib"))
"""Of the interpreter itself: before the packages, and read at every start."""


@contextmanager
def replaced(host: Host, path: Path, text: str, scratch: Path) -> Iterator[None]:
    """A file of another content there; on the other hosts it stays what it is."""
    other = scratch / f"other-{path.name}"
    other.write_text(text)
    with _bound(host, other, path):
        yield


@contextmanager
def hidden(host: Host, *paths: Path) -> Iterator[None]:
    """Files that cannot be run or read there, and folders that are empty."""
    with ExitStack() as planted:
        for path in paths:
            if path.is_dir():
                host.run("mount", "-t", "tmpfs", "none", path)
                planted.callback(host.run, "umount", path)
            else:
                planted.enter_context(_bound(host, Path(os.devnull), path.resolve()))
        yield


@contextmanager
def written(host: Host, path: Path, text: str) -> Iterator[None]:
    """A file in the host's own home or memory."""
    host.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1"', "sh", path, text)
    try:
        yield
    finally:
        host.run("rm", "-f", path)


@contextmanager
def login_says(host: Host, line: str) -> Iterator[None]:
    """What its shell reads at every login by ssh."""
    with written(host, Path("/root/.bashrc"), f"{line}\n"):
        yield


@contextmanager
def done(host: Host, do: str, undo: str) -> Iterator[None]:
    """A command there, and the one that takes it back."""
    host.run(*do.split())
    try:
        yield
    finally:
        host.run(*undo.split())


@contextmanager
def package_of_version(host: Host, package: str, version: str, scratch: Path) -> Iterator[None]:
    """The package's own record says another version."""
    metadata = next(SITE.glob(f"{package}-*.dist-info")) / "METADATA"
    lines = metadata.read_text().splitlines()
    text = "\n".join(f"Version: {version}" if li.startswith("Version:") else li for li in lines)
    with replaced(host, metadata, text, scratch):
        yield


@contextmanager
def another_source(host: Host, scratch: Path) -> Iterator[None]:
    """One more line in a file of the package."""
    path = ROOT / "flora_dist" / "core" / "tiles.py"
    with replaced(host, path, f"{path.read_text()}\n# changed\n", scratch):
        yield


@contextmanager
def without_program(host: Host, *names: str) -> Iterator[None]:
    """Programs that cannot be started there, wherever PATH finds them."""
    own = Path(sys.executable).parent
    found = [
        path for name in names for path in (own / name, _which(name)) if path and path.exists()
    ]
    with hidden(host, *dict.fromkeys(path.resolve() for path in found)):
        yield


@contextmanager
def without_mpi4py(host: Host) -> Iterator[None]:
    """Its folder and its record are empty."""
    with hidden(host, SITE / "mpi4py", next(SITE.glob("mpi4py-*.dist-info"))):
        yield


@contextmanager
def without_sshd(host: Host) -> Iterator[None]:
    """Nobody listens at its port 22."""
    host.run("sh", "-c", "kill $(cat /run/sshd.pid)")
    try:
        yield
    finally:
        variables = host.run("cat", "/proc/1/environ").stdout
        folder = next(v for v in variables.split("\0") if v.startswith("HOSTS_DIR=")).partition("=")
        host.run("/usr/sbin/sshd", "-f", f"{folder[2]}/sshd_config", "-E", "/run/sshd.log")


@contextmanager
def unplugged(host: Host, other: Host) -> Iterator[None]:
    """Its cable is out, and the other has not spoken to it lately: it knows sooner."""
    host.cable("down")
    other.run("ip", "neighbour", "flush", "dev", "eth0")
    try:
        yield
    finally:
        host.cable("up")


@contextmanager
def slow(host: Host, mbit: int) -> Iterator[None]:
    """Both ways of its cable are limited."""
    host.shape(mbit)
    try:
        yield
    finally:
        remove = ("tc", "qdisc", "del", "dev")
        host.run(*remove, "eth0", "root")
        enter = ("nsenter", "-t", str(host.switch), "--net", "--")
        subprocess.run([*enter, *remove, host.port, "root"], check=True)


@contextmanager
def stale_lock(host: Host, folder: Path) -> Iterator[None]:
    """What a compilation leaves that was killed an hour ago."""
    lock = folder / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    with written(host, lock, ""):
        host.run("touch", "-d", "1 hour ago", lock)
        yield


@contextmanager
def start_of_python(host: Host, text: str) -> Iterator[None]:
    """Code that every Python there runs first; the package's files stay what they are."""
    with written(host, LIBRARY / "sitecustomize.py", text):
        yield


AFTER_IMPORT = """
import importlib.abc, importlib.machinery, sys
class Change(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        run = found.loader.exec_module
        def execute(module):
            run(module)
            self.change(module)
        found.loader.exec_module = execute
        return found
def change(module):
{change}
Change.change = staticmethod(change)
sys.meta_path.insert(0, Change())
"""

OTHER_BITS = AFTER_IMPORT.format(
    module="flora_dist.core.sketch.matrices",
    change="""
    draw = module.sketch_matrix
    def wrong(*arguments, **named):
        found = draw(*arguments, **named)
        found[0, 0] = -found[0, 0]
        return found
    module.sketch_matrix = wrong
""",
)
WRONG_SUM = AFTER_IMPORT.format(
    module="torch.distributed.distributed_c10d",
    change="""
    add = module.all_reduce
    def wrong(tensor, *arguments, **named):
        add(tensor, *arguments, **named)
        tensor[5] += 1
    module.all_reduce = wrong
""",
)
DIES = AFTER_IMPORT.format(
    module="torch", change="    raise ImportError('libsomething.so.1: cannot open shared object')"
)


@contextmanager
def _bound(host: Host, other: Path, path: Path) -> Iterator[None]:
    host.run("mount", "--bind", other, path)
    try:
        yield
    finally:
        host.run("umount", path)


def _which(name: str) -> Path | None:
    found = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")
    return Path(found) if found else None


@contextmanager
def port_taken(host: Host, port: int) -> Iterator[None]:
    """Another program listens there."""
    listen = f"import socket, time; s = socket.create_server(('', {port})); time.sleep(600)"
    probe = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
    process = host.start(sys.executable, "-c", listen)
    try:
        until(lambda: host.run(sys.executable, "-c", probe, check=False).returncode == 0)
        yield
    finally:
        host.signal_all(lambda words: listen in words, signal.SIGKILL)
        process.wait()


def until(holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Wait for it; a machine that is busy may take its time."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"it did not come to hold within {limit_s:.0f} s"
        time.sleep(0.05)

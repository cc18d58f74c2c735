# SPDX-License-Identifier: Apache-2.0
"""What every launcher starts as a rank: it settles the environment and becomes the user's program.

Launchers disagree on the names of ranks, and each has quoting of its own: pdsh hands words to a
remote shell. So words travel percent-encoded, and ranks are renamed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from flora_dist.cluster.launch.locks import STALE_S, locks, may_wait_for_locks
from flora_dist.cluster.launch.processes import end_with_parent
from flora_dist.frameworks.build_lock import words
from flora_dist.world import interface_toward, is_of_this_machine, listen_at, read_world

MODULE = "flora_dist.cluster.launch.worker"
FOLDERS = "FLORA_FOLDERS"
"""Names what the paths of the job's folders begin with, where one of them holds secrets."""
SECRETS = "secrets"
"""Variables in JSON there, which no launcher has put on a command line."""
_KEPT, _KEEPER = "TORCHELASTIC_USE_AGENT_STORE", "flora_dist.cluster.local_store"
# Nothing here means anything to a shell; pdsh reads %n, %h and %u, which no encoded byte spells.
_PLAIN = "/:=+,.@-_"


def encode(words: Sequence[str]) -> list[str]:
    """Words that no shell changes.

    >>> encode(["--set", "backend={name: fsdp2}"])
    ['--set', 'backend=%7Bname:%20fsdp2%7D']
    """
    return [quote(word, safe=_PLAIN) if word else "%" for word in words]


def decode(words: Sequence[str]) -> list[str]:
    """The words before `encode`."""
    return ["" if word == "%" else unquote(word) for word in words]


def settled(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with torch's names for this process's place and the interface toward rank 0.

    Raises:
        ValueError: the launcher's variables contradict each other.
    """
    place = read_world(environment)
    found = {**environment, **_secrets(environment), **place.variables()}
    interface = interface_toward(place.address) if place.address else None
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            found.setdefault(name, interface)
    return found


def meet_here(environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank of a one-machine job must know to meet the others where nobody else comes.

    Process 0 starts a keeper of the store, which ends with it: the program that this process
    becomes would keep one that listens at all addresses. torch's name for it is that of torchrun's.

    Raises:
        ValueError: another program has the port.
    """
    place = read_world(environment)
    if environment.get(_KEPT) == "True" or not is_of_this_machine(place.address):
        return {}
    if place.process_rank == 0:
        with listen_at(str(place.address), place.port) as listening:
            subprocess.Popen(
                [sys.executable, "-m", _KEEPER, str(listening.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
                preexec_fn=end_with_parent,
            )
    return {_KEPT: "True"}


def refuse_stale_locks(environment: Mapping[str, str]) -> None:
    """Where no agent has looked before (Slurm), a rank would wait for ever without a word.

    Raises:
        ValueError: a lock that a killed compilation has left.
    """
    for lock in locks(environment.get("TORCH_EXTENSIONS_DIR")):
        if not lock.is_held and lock.age_s >= STALE_S:
            raise ValueError(
                "a killed job has left a lock for which every later one waits; "
                f"{words(lock.path, lock.age_s, lock.owner)}."
            )


def _secrets(environment: Mapping[str, str]) -> dict[str, str]:
    begin = environment.get(FOLDERS)
    found: dict[str, str] = {}
    for folder in Path(begin).parent.glob(f"{Path(begin).name}*") if begin else ():
        # The job's name is on command lines: another user may have planted a folder for us.
        if folder.lstat().st_uid == os.geteuid() and (folder / SECRETS).is_file():
            found |= json.loads((folder / SECRETS).read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Become ``python WORDS``: a script and its arguments, or -m and a module and its own."""
    words = decode(sys.argv[1:])
    try:
        environment = settled(os.environ)
        if may_wait_for_locks(words):
            refuse_stale_locks(environment)
        environment |= meet_here(environment)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    # The same process: signals and exit codes are the program's own, and nothing waits beside it.
    os.execve(sys.executable, [sys.executable, "-u", *words], environment)


if __name__ == "__main__":
    main()

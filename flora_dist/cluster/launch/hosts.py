# SPDX-License-Identifier: Apache-2.0
"""Which hosts a job runs on: a hostfile, a list of nodes, or this machine alone."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

# What DNS allows, and IPv4: a name is a word of ssh's, pdsh's and mpirun's command lines.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PORT = re.compile(r"\[?[A-Za-z0-9_.-]+\]?:\d*")
THIS_MACHINE = "localhost"
_LAST_PORT = 65535
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\S+)(?P<rest>.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine of a job."""

    name: str
    """As ssh and every other host know it; no alias of ssh's configuration alone."""
    slots: int
    """Processes there."""


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file in DeepSpeed's and MPI's form, one "name slots=N" a line.

    Raises:
        ValueError: the file cannot be read, a line has another form, a host is named twice, or
            no host is named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the hostfile must be a readable text; {str(path)!r}: {error}. Name another one."
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _LINE.fullmatch(words)
        if match is None or match["rest"].strip():
            raise ValueError(
                f"a hostfile has one 'name slots=N' a line; {path}:{number} is {line.strip()!r}. "
                "Write the host's name, a space and slots= with its number of processes."
            )
        found.append(_host(match["name"], match["slots"], f"{path}:{number}"))
    return _checked(found, str(path))


def read_nodes(text: str, slots: int) -> tuple[Host, ...]:
    """The hosts of a list "node1,node2:4"; ``slots`` where no number of processes is given.

    >>> [(host.name, host.slots) for host in read_nodes("node1,node2:4", 1)]
    [('node1', 1), ('node2', 4)]

    Raises:
        ValueError: a word is not a host's name, a host is named twice, or no host is named.
    """
    found = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, number = (word, "", "") if _is_ipv6(word) else word.partition(":")
        found.append(_host(name, number or str(slots), f"--nodes {text!r}"))
    return _checked(found, f"--nodes {text!r}")


def address_of(name: str) -> str:
    """The IPv4 address behind a host's name.

    Raises:
        ValueError: the name does not resolve.
    """
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise ValueError(
            f"every host must have a name that resolves here; {name!r} does not ({error}). "
            "Correct the hostfile, /etc/hosts or DNS."
        ) from None


def check_name(name: str, where: str) -> None:
    """Whether every launcher takes it.

    Raises:
        ValueError: a user, a port, IPv6 or other characters.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{_rule(name)}; {where} names {name!r}. {_remedy(name)}")


def check_port(port: int) -> None:
    """Whether process 0 can listen there.

    Raises:
        ValueError: no port of TCP.
    """
    if not 0 < port <= _LAST_PORT:
        raise ValueError(f"--master-port must lie in 1 to {_LAST_PORT}; it is {port}. Correct it.")


def are_this_machine(hosts: Sequence[Host]) -> bool:
    """Whether a job named no host: then it runs here, without ssh or names."""
    return [host.name for host in hosts] == [THIS_MACHINE]


def is_local(name: str) -> bool:
    """Whether a host is this machine: its address is one of ours.

    No where its name does not resolve: that of a container goes with it, and ssh says so.
    """
    with socket.socket() as probe:
        try:
            probe.bind((name, 0))
        except OSError:
            return False
    return True


def _host(name: str, slots: str, where: str) -> Host:
    check_name(name, where)
    if not slots.isdecimal() or int(slots) < 1:
        raise ValueError(
            f"a host's slots must be a whole number from 1; {where} gives {name!r} {slots!r}. "
            "Write the number of its processes, one per GPU."
        )
    return Host(name=name, slots=int(slots))


def _is_ipv6(name: str) -> bool:
    try:
        return isinstance(ip_address(name.strip("[]").partition("%")[0]), IPv6Address)
    except ValueError:
        return name.startswith("[") or name.count(":") > 1


def _rule(name: str) -> str:
    if "@" in name:
        return "a host must be named without a user, since its ranks use the same name"
    if _is_ipv6(name):
        return "a host must be given by its name or its IPv4 address"
    if _PORT.fullmatch(name):
        return "a host must be named without a port"
    return "a host's name may hold only letters, digits, '.', '-' and '_'"


def _remedy(name: str) -> str:
    user, _, host = name.rpartition("@")
    if user:
        host = host.partition(":")[0] if _PORT.fullmatch(host) else host
        return f"Write {host}, and in ~/.ssh/config: Host {host}, then User {user}."
    if _is_ipv6(name):
        return (
            "torch, DeepSpeed and the launchers are given IPv4 addresses here: write a name that "
            "has one."
        )
    if _PORT.fullmatch(name):
        host, _, port = name.partition(":")
        return f"Write {host}, and for ssh in ~/.ssh/config: Host {host}, then Port {port}."
    return "Correct it."


def _checked(found: list[Host], where: str) -> tuple[Host, ...]:
    if not found:
        raise ValueError(f"a job needs at least one host; {where} names no host. Name one or more.")
    names = [host.name for host in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"each host must be named once, with all its slots; {where} repeats "
            f"{', '.join(twice)}. Join its lines."
        )
    return tuple(found)

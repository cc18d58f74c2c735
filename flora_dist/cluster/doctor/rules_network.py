# SPDX-License-Identifier: Apache-2.0
"""Rules on names, interfaces, ports and links."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from flora_dist.cluster.doctor.facts import HostFacts
from flora_dist.cluster.doctor.survey import Finding, Link, Survey, error, groups, warning

SLOW = 5.0
"""So many times below the fastest is slow: ports that fell back to a tenth, not a busy moment."""


def names_resolve(survey: Survey) -> Iterator[Finding]:
    """Every host finds every other, at the same address."""
    if not survey.asked.is_cluster:
        return
    for host in survey.facts:
        for name, address in host.network.names.items():
            if address is None:
                yield error(
                    "name", [host.name], f"{host.name} does not resolve the name {name}",
                    f"Add {name} to DNS or to /etc/hosts of {host.name}.",
                )  # fmt: skip
    for wanted in survey.asked.hosts:
        seen = {
            host.name: address
            for host in survey.facts
            # Its own name as loopback is another rule's.
            if (address := host.network.names.get(wanted.name)) is not None
            and not (host.name == wanted.name and ip_address(address).is_loopback)
        }
        if differ := groups(seen):
            yield warning(
                "name", differ[1], f"the name {wanted.name} differs: {differ[0]}",
                "Correct /etc/hosts or DNS, unless these are two networks of one host.",
            )  # fmt: skip


def own_name_is_reachable(survey: Survey) -> Iterator[Finding]:
    """Debian's /etc/hosts says 127.0.1.1; gloo tells the others that address, and all wait."""
    if not survey.asked.is_cluster:
        return
    for host in survey.facts:
        own, interface = host.network.own, host.interface()
        name = interface.name if interface else "eth0"
        remedy = (
            f"Set GLOO_SOCKET_IFNAME={name} (flora-dist launch does), or give the name its "
            f"address{f' {interface.address}' if interface else ''} in /etc/hosts."
        )
        # With an interface named gloo asks nobody.
        if host.network.gloo is not None:
            continue
        if own is None:
            what = f"{host.name} does not resolve its own host name: gloo falls back to loopback"
            yield warning("own name", [host.name], what, remedy)
        elif ip_address(own).is_loopback:
            what = (
                f"{host.name} resolves its own host name to {own}: gloo tells other hosts that "
                "address, and they wait"
            )
            yield warning("own name", [host.name], what, remedy)


def interfaces_are_right(survey: Survey) -> Iterator[Finding]:
    """The interface that the environment names is there and reaches the others."""
    for host in survey.facts:
        if host.network.toward is None:
            yield error(
                "interface", [host.name],
                f"{host.name} has no route to the master address {survey.asked.master}",
                f"Look at `ip route get {survey.asked.master}` on {host.name}, or name an address "
                "by --master-addr that every host reaches.",
            )  # fmt: skip
        if host.network.gloo is not None:
            names = host.network.gloo.split(",")
            yield from _chosen(survey, host, "GLOO_SOCKET_IFNAME", names)
        if host.network.nccl is not None:
            yield from _chosen(survey, host, "NCCL_SOCKET_IFNAME", _nccl_choice(host))


def _nccl_choice(host: HostFacts) -> list[str]:
    """NCCL's forms: names are beginnings, "=" wants the whole, "^" all but these."""
    text = host.network.nccl or ""
    have = [interface.name for interface in host.network.interfaces]
    words = text.lstrip("^=").split(",")
    exact = text.lstrip("^").startswith("=")
    matched = [
        name for name in have if any(name == w if exact else name.startswith(w) for w in words)
    ]
    if text.startswith("^"):
        return [name for name in have if name not in matched and name != "lo"] or [text]
    return matched or words


def _chosen(survey: Survey, host: HostFacts, variable: str, names: list[str]) -> Iterator[Finding]:
    have = {interface.name: interface for interface in host.network.interfaces}
    value = host.network.gloo if variable.startswith("GLOO") else host.network.nccl
    toward = host.network.toward
    listed = ", ".join(f"{each.name} {each.address}" for each in have.values())
    remedy = f"Set {variable}={toward or 'one of these'} for {host.name}, or unset it."
    if not any(name in have for name in names):
        what = (
            f"{variable}={value} on {host.name}, which has no such interface with an address: "
            f"{listed}"
        )
        yield error("interface", [host.name], what, remedy)
    elif survey.asked.is_cluster and toward is not None and toward not in names:
        what = (
            f"{variable}={value} on {host.name}, but the way to {survey.asked.master} is {toward}"
        )
        # Loopback cannot be right; another network may be meant.
        is_loop = all(ip_address(have[name].address).is_loopback for name in names if name in have)
        yield (error if is_loop else warning)("interface", [host.name], what, remedy)


def mtu_agrees(survey: Survey) -> Iterator[Finding]:
    """Between two sizes large packets vanish where a router does not say so."""
    sizes = {
        host.name: str(interface.mtu)
        for host in survey.facts
        if (interface := host.interface()) is not None and interface.name != "lo"
    }
    if differ := groups(sizes):
        yield warning(
            "mtu", differ[1], f"the MTU of the job's interfaces differs: {differ[0]}",
            "Set one: ip link set dev NAME mtu 9000 (or 1500) on every host and switch.",
        )  # fmt: skip


def ports_are_free(survey: Survey) -> Iterator[Finding]:
    """Process 0 listens where everybody expects it."""
    for port in survey.ports:
        yield error(
            "port", [port.host],
            f"port {port.port} of {port.host} cannot be opened: {port.trouble}",
            "End the job that has it (ss -ltnp), or choose another by --master-port.",
        )  # fmt: skip


def hosts_reach_each_other(survey: Survey) -> Iterator[Finding]:
    """Ranks connect to each other on ports of the system's choice, and to process 0's."""
    for link in survey.links:
        trouble = link.measured.trouble
        if trouble is not None:
            kind = "process 0's port" if link.port == survey.asked.port else "a free port"
            yield error(
                "reach", [link.source, link.target],
                f"{link.source} cannot connect to {link.target} at {link.address}:{link.port} "
                f"({kind}): {trouble}",
                f"Let TCP pass from {link.source} to {link.target}: firewall (iptables -L, "
                "security groups), route, or another interface by --interface.",
            )  # fmt: skip


def slow_links(survey: Survey) -> tuple[Link, ...]:
    """Links below what was asked for, or far below the fastest."""
    rates = {link: rate for link in survey.links if (rate := _slower_way(link)) is not None}
    if not rates:
        return ()
    least = survey.asked.minimum_mbit
    floor = max(rates.values()) / SLOW if least is None else least
    return tuple(link for link, rate in rates.items() if rate < floor)


def links_are_fast(survey: Survey) -> Iterator[Finding]:
    """Names the host all whose links are slow, else the pair."""
    slow = slow_links(survey)
    if not slow:
        return
    rates = {link: rate for link in survey.links if (rate := _slower_way(link)) is not None}
    least = survey.asked.minimum_mbit
    best = max(rates.values())
    against = f"the fastest of the job has {best:.0f}" if least is None else f"asked for {least:g}"
    say = warning if least is None else error
    guilty = _slow_hosts(list(rates), slow)
    for name, links in guilty.items():
        least_rate = min(rates[link] for link in links)
        yield say(
            "slow", [name],
            f"all {len(links)} links of {name} are slow: {least_rate:.0f} Mbit/s; {against}",
            _look_at(name),
        )  # fmt: skip
    for link in slow:
        if link.source not in guilty and link.target not in guilty:
            yield say(
                "slow", [link.source, link.target],
                f"the link {link.source} to {link.target} is slow: {rates[link]:.0f} Mbit/s; "
                f"{against}",
                _look_at(f"{link.source} and {link.target}"),
            )  # fmt: skip


def _slow_hosts(rated: list[Link], slow: tuple[Link, ...]) -> dict[str, list[Link]]:
    """Hosts with several links, all of them slow, and these."""
    links: dict[str, list[Link]] = {}
    for link in rated:
        for name in (link.source, link.target):
            links.setdefault(name, []).append(link)
    return {
        name: own
        for name, own in links.items()
        if len({frozenset((link.source, link.target)) for link in own}) > 1
        and set(own) <= set(slow)
    }


def _look_at(names: str) -> str:
    return (
        f"Look at {names}: ethtool NAME (speed, duplex, errors), cable, switch, traffic of other "
        "jobs."
    )


def _slower_way(link: Link) -> float | None:
    there, back = link.measured.there_mbit, link.measured.back_mbit
    return None if there is None or back is None else min(there, back)

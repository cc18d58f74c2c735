# SPDX-License-Identifier: Apache-2.0
"""A survey as text for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from flora_dist.cluster.doctor.facts import HostFacts, as_tree
from flora_dist.cluster.doctor.survey import Finding, Survey
from flora_dist.cluster.doctor.trial_sizes import LARGE_BYTES, SMALL_BYTES
from flora_dist.columns import aligned

_GIB = 1 << 30
_NONE = "-"


def as_json(survey: Survey) -> str:
    """Everything, with sorted keys; `ok` is false where there is an error."""
    tree: dict[str, Any] = {
        "ok": not has_errors(survey),
        "slots": {host.name: host.slots for host in survey.asked.hosts},
        "master": f"{survey.asked.master}:{survey.asked.port}",
        "hosts": [as_tree(facts) for facts in survey.facts],
        "links": [asdict(link) for link in survey.links],
        "ports": [asdict(port) for port in survey.ports],
        "ranks": [asdict(rank) for rank in survey.ranks],
        "all_reduce": all_reduce(survey),
        "findings": [asdict(finding) for finding in survey.findings],
        "notes": list(survey.notes),
    }
    return json.dumps(tree, indent=1, sort_keys=True)


def as_text(survey: Survey) -> str:
    """Tables, notes, a line for each finding, and the verdict."""
    blocks = [
        _hosts(survey),
        _links(survey),
        _ranks(survey),
        "\n".join(f"note: {note}" for note in survey.notes),
        "\n".join(_line(finding) for finding in survey.findings),
        _verdict(survey),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def has_errors(survey: Survey) -> bool:
    """Whether a job would fail, hang or compute something else."""
    return any(finding.severity == "error" for finding in survey.findings)


def all_reduce(survey: Survey) -> dict[str, float] | None:
    """Seconds of the slowest rank, and the bus bandwidth: bytes x 2 (n - 1) / n / seconds.

    Source of the formula: nccl-tests, PERFORMANCE.md; what a link must carry, whatever n.
    """
    results = [rank.result for rank in survey.ranks if rank.result is not None]
    size = len(survey.ranks)
    if size < 2 or len(results) < size:
        return None
    large = max(float(result["large_s"]) for result in results)
    return {
        "small_bytes": SMALL_BYTES,
        "small_s": max(float(result["small_s"]) for result in results),
        "large_bytes": LARGE_BYTES,
        "large_s": large,
        "bus_bytes_per_s": LARGE_BYTES * 2 * (size - 1) / size / large,
    }


def _hosts(survey: Survey) -> str:
    head: tuple[str, ...] = ("host", "slots", "address", "interface", "MTU", "devices", "/dev/shm")
    head += ("python", "torch", "deepspeed", "mpi4py", "flora_dist", "kernels")
    told = {host.name: host for host in survey.facts}
    rows = [head]
    for host in survey.asked.hosts:
        facts = told.get(host.name)
        row = _row(facts) if facts else (_NONE,) * (len(head) - 2)
        rows.append((host.name, str(host.slots), *row))
    return aligned(rows, left=len(rows[0]))


def _row(facts: HostFacts) -> tuple[str, ...]:
    interface = facts.interface()
    seen = (interface.address, interface.name, str(interface.mtu)) if interface else (_NONE,) * 3
    devices = f"{len(facts.gpus)} x {facts.gpus[0].name}" if facts.gpus else f"{facts.cpus} cores"
    versions = [facts.packages.get(name, _NONE) for name in ("torch", "deepspeed", "mpi4py")]
    own = f"{facts.packages.get('flora-dist', _NONE)} {facts.source}"
    shm = f"{facts.limits.shm_bytes / _GIB:.2f} GiB"
    return (*seen, devices, shm, facts.python, *versions, own, facts.kernels.path)


def _links(survey: Survey) -> str:
    rows = [("link", "round trip", "Mbit/s there", "Mbit/s back")]
    for link in survey.links:
        seen = link.measured
        if seen.there_mbit is None or seen.back_mbit is None or seen.trip_ms is None:
            continue
        rates = (f"{seen.there_mbit:.0f}", f"{seen.back_mbit:.0f}")
        rows.append((f"{link.source} to {link.target}", f"{seen.trip_ms:.2f} ms", *rates))
    return aligned(rows, left=len(rows[0])) if len(rows) > 1 else ""


def _ranks(survey: Survey) -> str:
    results = [rank.result for rank in survey.ranks if rank.result is not None]
    lines = []
    if results:
        nccl = f", NCCL {results[0]['nccl']}" if results[0]["nccl"] else ""
        lines.append(
            f"{len(results)} of {len(survey.ranks)} ranks in a group "
            f"(torch {results[0]['torch']}{nccl})"
        )
    measured = all_reduce(survey)
    if measured:
        lines.append(
            f"all-reduce: {SMALL_BYTES >> 10} KiB in {measured['small_s'] * 1e3:.2f} ms, "
            f"{LARGE_BYTES >> 20} MiB in {measured['large_s'] * 1e3:.1f} ms: bus bandwidth "
            f"{measured['bus_bytes_per_s'] / 1e9:.3f} GB/s (bytes x 2 (n - 1) / n / time)"
        )
    digests = {digest for result in results for digest in result["projection"].values()}
    if len(digests) == 1:
        devices = sorted({device for result in results for device in result["projection"]})
        lines.append(
            f"projection: the same bits on every rank ({', '.join(devices)}): {min(digests)}"
        )
    return "\n".join(lines)


def _line(finding: Finding) -> str:
    return f"{finding.severity}: {finding.what}. {finding.remedy}"


def _verdict(survey: Survey) -> str:
    errors = sum(finding.severity == "error" for finding in survey.findings)
    warnings = len(survey.findings) - errors
    if not survey.findings:
        return "nothing found"
    return f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"

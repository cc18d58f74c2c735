# SPDX-License-Identifier: Apache-2.0
"""All rules, by what they need to have been looked at; each is a pure function of the survey."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flora_dist.cluster.doctor import rules_host, rules_network, rules_ranks, rules_software
from flora_dist.cluster.doctor.survey import Finding, Survey

Rule = Callable[[Survey], Iterator[Finding]]

ON_FACTS: tuple[Rule, ...] = (
    rules_software.python_agrees,
    rules_software.packages_agree,
    rules_software.source_agrees,
    rules_software.torch_is_there,
    rules_software.mpi_works,
    rules_software.cpu_helper_builds,
    rules_software.kernels_are_there,
    rules_software.locks_are_held,
    rules_software.env_file_reads,
    rules_software.configs_agree,
    rules_host.slots_fit_gpus,
    rules_host.gpus_agree,
    rules_host.shared_memory_suffices,
    rules_host.limits_suffice,
    rules_host.disk_has_room,
    rules_host.folder_exists,
    rules_host.clocks_agree,
    rules_network.names_resolve,
    rules_network.own_name_is_reachable,
    rules_network.interfaces_are_right,
    rules_network.mtu_agrees,
)
ON_LINKS: tuple[Rule, ...] = (
    rules_network.ports_are_free,
    rules_network.hosts_reach_each_other,
    rules_network.links_are_fast,
)
ON_RANKS: tuple[Rule, ...] = (
    rules_ranks.ranks_came,
    rules_ranks.sum_is_right,
    rules_ranks.projections_agree,
    rules_ranks.ranks_load_the_same,
)


def apply(rules: Iterable[Rule], survey: Survey) -> tuple[Finding, ...]:
    """What these rules find, in their order."""
    return tuple(finding for rule in rules for finding in rule(survey))

# SPDX-License-Identifier: Apache-2.0
"""Who sums which records: ranks of one group, and what each of them owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from flora_dist.core.comm.groups import gather
from flora_dist.gradients.route import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Owners:
    """Ranks of one group, and what each owns: some lines of what its replicas keep, too."""

    group: dist.ProcessGroup
    places: tuple[tuple[int, int], ...]
    """By rank of the group: which of the route's ``kept``, and place among its replicas."""
    replicas: dist.ProcessGroup | None
    """This rank's; None: it keeps what it owns."""

    @property
    def num_replicas(self) -> int:
        """Of everything that is kept."""
        return 1 if self.replicas is None else dist.get_world_size(self.replicas)

    @property
    def me(self) -> int:
        """This rank."""
        return dist.get_rank(self.group)

    @property
    def replicas_of_me(self) -> list[int]:
        """Ranks that keep the same, in the order of ``replicas``."""
        kept = self.places[self.me][0]
        return sorted(
            (rank for rank, place in enumerate(self.places) if place[0] == kept),
            key=lambda rank: self.places[rank][1],
        )


def owners_of(route: Route) -> Owners:
    """All ranks of the route must call this."""
    assert len(route.sums) <= 1, route
    replicas = route.sums[0] if route.sums else None
    if route.scatter is None:
        assert replicas is not None, route
        places = tuple((0, rank) for rank in range(dist.get_world_size(replicas)))
        return Owners(group=replicas, places=places, replicas=replicas)
    if replicas is None:
        places = tuple((rank, 0) for rank in range(dist.get_world_size(route.scatter)))
        return Owners(group=route.scatter, places=places, replicas=None)
    own = (dist.get_rank(), route.rank, dist.get_rank(replicas))
    everyone = sorted(gather(own, [route.scatter, replicas]))
    group = dist.group.WORLD
    if len(everyone) < dist.get_world_size():
        ranks = [rank for rank, _, _ in everyone]
        group = dist.new_group(ranks, use_local_synchronization=True)
    assert group is not None
    return Owners(
        group=group,
        places=tuple((kept, replica) for _, kept, replica in everyone),
        replicas=replicas,
    )

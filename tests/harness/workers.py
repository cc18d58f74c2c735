# SPDX-License-Identifier: Apache-2.0
"""Which tests go to one worker of pytest-xdist.

Its own groups, by mark, are of no effect with pytest 9.2, which has no node ids to be changed.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

ON_HOSTS = "tests/cluster/"


class ByFile(LoadScopeScheduling):
    """Tests of one file run in one worker, in order, since they share ranks.

    All on several hosts do: they share the hosts' names.
    """

    def _split_scope(self, nodeid: str) -> str:
        return ON_HOSTS if nodeid.startswith(ON_HOSTS) else nodeid.split("::", 1)[0]

# SPDX-License-Identifier: Apache-2.0
"""What other code asks for, and kernels do where there are any."""

from __future__ import annotations

from flora_dist.core.sketch.philox import draw_by
from flora_dist.core.sketch.quantise import read_by
from flora_dist.kernels.random_bits import drawn
from flora_dist.kernels.records import read


def use_kernels() -> None:
    """Draw and read records on CPUs by them from now on."""
    draw_by("cpu", drawn)
    read_by("cpu", read)

# SPDX-License-Identifier: Apache-2.0
"""The sizes of the ranks' all-reduce, where the report may read them without torch."""

SMALL_BYTES = 1 << 10
"""Time of it: latency."""
LARGE_BYTES = 8 << 20
"""Time of it: bandwidth. A slow link of 10 Mbit/s takes 7 s for each."""

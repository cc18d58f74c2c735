# SPDX-License-Identifier: Apache-2.0
"""`python -m flora_dist.trainer` and `torchrun -m flora_dist.trainer`."""

from __future__ import annotations

import sys

from flora_dist.trainer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

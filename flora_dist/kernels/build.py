# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of an installed flora_dist, once.

    python -m flora_dist.kernels.build

They go beside this file; where that folder cannot be written, into the user's cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from flora_dist.kernels.compiler import CannotBuildError, build, torch_at
from flora_dist.kernels.presence import cache_folder, package_folder


def main() -> int:
    """Compile; the exit code is 0 where the library is there now."""
    installed = torch_at(Path(torch.__file__).parent.parent)
    if installed is None:
        sys.stderr.write(
            f"the kernels must be compiled against torch's headers; {Path(torch.__file__).parent} "
            "has none. Install torch by pip, which brings them.\n"
        )
        return 1
    folder = package_folder()
    if not os.access(folder, os.W_OK):
        folder = cache_folder()
    try:
        path = build(installed, folder)
    except CannotBuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

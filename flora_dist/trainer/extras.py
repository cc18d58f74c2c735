# SPDX-License-Identifier: Apache-2.0
"""What the trainer needs beyond torch, and how it keeps off the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_train_extra() -> Iterator[None]:
    """Turn a missing third-party package into an error that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("flora_dist"):
            raise
        raise ValueError(
            f"the trainer needs the package {error.name!r}, which is not installed. "
            'Run: pip install "flora-dist[train]"'
        ) from error


def stay_offline() -> None:
    """Forbid the Hugging Face libraries every download: models, tokenizers and data are local.

    The libraries read these once, when they are imported.
    """
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        # Several processes share the machine; the fast tokenizers warn about forks otherwise.
        TOKENIZERS_PARALLELISM="false",
    )

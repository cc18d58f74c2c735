# SPDX-License-Identifier: Apache-2.0
"""What the trainer needs beyond torch, and how it keeps off the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


def needs_train_extra() -> AbstractContextManager[None]:
    """Turn a missing third-party package into an error that names the extra."""
    return _needs("flora-dist[train]")


def needs_deepspeed_extra() -> AbstractContextManager[None]:
    """The same for the packages of the deepspeed backend."""
    return _needs("flora-dist[train,deepspeed]")


def needs_lora_extra() -> AbstractContextManager[None]:
    """The same for adapters."""
    return _needs("flora-dist[train,lora]")


@contextmanager
def _needs(requirement: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("flora_dist"):
            raise
        raise ValueError(
            f"the trainer needs the package {error.name!r}, which is not installed. "
            f'Run: pip install "{requirement}"'
        ) from error


def stay_offline() -> None:
    """Forbid the Hugging Face libraries every download: what is named of the hub is fetched before.

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

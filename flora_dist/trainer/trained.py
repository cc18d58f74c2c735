# SPDX-License-Identifier: Apache-2.0
"""What others need of a run: its network's config, its tokenizer, and its newest weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flora_dist.checkpoint import folder as folders
from flora_dist.checkpoint.convert.whole import read_weights
from flora_dist.trainer.config_data import LoraConfig
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.tokenizer import Tokenizer
from flora_dist.trainer.utf8 import read_utf8

with needs_train_extra():
    from pydantic import TypeAdapter

CHECKPOINTS = "checkpoints"
"""A run's folder of checkpoints."""
_CARD = "model"
_LORA = "lora.json"


def write_card(run: Path, network: Any, tokenizer: Tokenizer, lora: LoraConfig | None) -> None:
    """Put into a run's folder what its weights need to be used without its config and corpus."""
    folder = run / _CARD
    network.save_pretrained(folder)
    tokenizer.save(folder)
    if lora is not None:
        (folder / _LORA).write_text(json.dumps(asdict(lora)) + "\n", encoding="utf-8")


def adapters_of(run: Path) -> LoraConfig | None:
    """The adapters that a run trains; None: the network itself."""
    file = run / _CARD / _LORA
    if not file.is_file():
        return None
    return TypeAdapter(LoraConfig).validate_json(read_utf8(file))


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, which has its weights in checkpoints."""
    return (path / _CARD / "config.json").is_file()


def card_of(path: Path) -> Path:
    """The folder with a trained model's config and tokenizer: a run's card, or the folder itself.

    Raises:
        ValueError: there is no config in it.
    """
    if is_run(path):
        return path / _CARD
    if (path / "config.json").is_file():
        return path
    raise ValueError(
        f"a trained model is the folder of a run, or one that save_pretrained wrote; '{path}' is "
        "neither. Name <output.folder>/<output.name>."
    )


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Whole weights and buffers of a run's newest checkpoint, by name; no optimizer state.

    Raises:
        ValueError: it has no checkpoint, or a damaged one.
    """
    folder = run / CHECKPOINTS
    if not folders.has_checkpoint(folder):
        raise ValueError(
            f"a run's weights are in its checkpoints; '{run}' has none. Train it with "
            "checkpoint.every set to a number of steps: the last step is always saved."
        )
    return read_weights(folder)

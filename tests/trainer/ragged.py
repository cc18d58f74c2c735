# SPDX-License-Identifier: Apache-2.0
"""A global batch of 8 sequences whose numbers of counted labels differ widely."""

from __future__ import annotations

import torch
from torch import nn

from flora_dist.trainer.arrange import arranged
from flora_dist.trainer.config import Config
from flora_dist.trainer.data import IGNORED
from flora_dist.trainer.loop import MicroBatch
from flora_dist.trainer.model import build_model, read_model_config
from flora_dist.trainer.tokenizer import ByteTokenizer

MICRO_BATCH = 1
COUNTED = (32, 1, 5, 30, 2, 32, 7, 3)


def tiny_model(config: Config) -> nn.Module:
    network = read_model_config(config.model, ByteTokenizer(), config.data.sequence_length)
    return arranged(build_model(config.model, network, seed=config.train.seed), config.model)


def whole_batch() -> MicroBatch:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 257, (len(COUNTED), 33), generator=random)
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    for row, counted in enumerate(COUNTED):
        labels[row, counted:] = IGNORED
    return inputs, labels


def micro_batches(process_rank: int, world_size: int) -> list[MicroBatch]:
    inputs, labels = whole_batch()
    rows = torch.arange(len(COUNTED)).reshape(-1, world_size, MICRO_BATCH)[:, process_rank]
    return [(inputs[part], labels[part]) for part in rows]


def token_count() -> int:
    return sum(COUNTED)

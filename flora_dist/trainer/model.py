# SPDX-License-Identifier: Apache-2.0
"""Networks from transformers configs or local folders, with the tokenizer's vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_dist.trainer.config import PURE, ModelConfig, TrainConfig
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.tokenizer import Tokenizer


def read_model_config(config: ModelConfig, tokenizer: Tokenizer, sequence_length: int) -> Any:
    """The transformers config of the run, checked against tokenizer and sequence length.

    Raises:
        ValueError: the file is no model config, the sequences are longer than the model's
            positions, or a pretrained model has too few embeddings for the tokenizer.
    """
    with needs_train_extra():
        from transformers import AutoConfig
    path = Path(config.config or config.pretrained or "")
    try:
        network = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model must name a transformers config with a model_type; {str(path)!r} gave: "
            f"{error} Code that comes with a model is never run. See configs/model for examples."
        ) from error
    if config.config is not None:
        network.vocab_size = tokenizer.vocabulary
        # The file's special tokens belong to another vocabulary.
        network.bos_token_id = network.pad_token_id = None
        network.eos_token_id = tokenizer.end
    if network.vocab_size < tokenizer.vocabulary:
        raise ValueError(
            f"a pretrained model needs an embedding for each token; {str(path)!r} has "
            f"{network.vocab_size}, the tokenizer {tokenizer.vocabulary}. Use the model's own "
            "tokenizer: set data.tokenizer to its folder."
        )
    positions = getattr(network, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ValueError(
            f"data.sequence_length must be within the model's positions; it is {sequence_length}, "
            f"{str(path)!r} has {positions}. Lower it."
        )
    return network


def build_model(
    config: ModelConfig, network: Any, *, seed: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network on the CPU, equal on every process: drawn from the seed in float32, or loaded.

    ``dtype`` is that of weights alone: positions in bfloat16 would not be whole numbers beyond 256.
    """
    with needs_train_extra():
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    # Loading draws a bar on every process.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    model: nn.Module
    if config.pretrained is not None:
        model = AutoModelForCausalLM.from_pretrained(
            config.pretrained,
            config=network,
            local_files_only=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    else:
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            network, dtype=torch.float32, trust_remote_code=False
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train()


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Of weights at rest."""
    return torch.bfloat16 if config.precision == PURE else torch.float32


def shapes_only(network: Any) -> nn.Module:
    """The network without memory for its weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            network, trust_remote_code=False
        )
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of weights; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def sum_of_losses(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labels that count; arithmetic in float32.

    The sum, not the mean: micro-batches hold different numbers of labels, and only sums of them
    add up to the mean over the global batch.
    """
    logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
    )

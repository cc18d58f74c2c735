# SPDX-License-Identifier: Apache-2.0
"""Networks from transformers configs or local folders, with the tokenizer's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_dist.trainer.arrange import with_adapters
from flora_dist.trainer.chunked_loss import chunking_head
from flora_dist.trainer.config import PURE, TrainConfig
from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.optional_imports import needs_train_extra
from flora_dist.trainer.tokenizer import Tokenizer
from flora_dist.trainer.trained import adapters_of, card_of, is_run, weights_of


def read_model_config(config: ModelConfig, tokenizer: Tokenizer, sequence_length: int) -> Any:
    """The transformers config of the run, checked against tokenizer and sequence length.

    Raises:
        ValueError: the file is no model config, the sequences are longer than the model's
            positions, or a pretrained model has too few embeddings for the tokenizer.
    """
    path = Path(config.config) if config.config else card_of(Path(config.pretrained or ""))
    network = read_network(path)
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


def vocabulary_in_file(config: ModelConfig) -> int | None:
    """The vocabulary that a model's file names and the tokenizer's replaces; None: it stays."""
    if config.config is None:
        return None
    named: int | None = getattr(read_network(Path(config.config)), "vocab_size", None)
    return named


def read_network(path: Path) -> Any:
    """A transformers config: a file, or the one in a folder.

    Raises:
        ValueError: the file is no model config.
    """
    with needs_train_extra():
        from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each model's config has errors of its own
        raise ValueError(
            f"model must name a transformers config with a model_type; {str(path)!r} gave: "
            f"{' '.join(str(error).split())} Code that comes with a model is never run. See "
            "configs/model for examples."
        ) from error


def build_model(
    config: ModelConfig, network: Any, *, seed: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network on the CPU, equal on every process: drawn from the seed in float32, or loaded.

    ``dtype`` is that of weights alone: positions in bfloat16 would not be whole numbers beyond 256.

    Raises:
        ValueError: weights that are to be loaded are missing, damaged or another model's.
    """
    with needs_train_extra():
        from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    pretrained = None if config.pretrained is None else Path(config.pretrained)
    model: nn.Module
    if pretrained is not None and not is_run(pretrained):
        model = _load(pretrained, network)
    else:
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            network, dtype=torch.float32, trust_remote_code=False
        )
        if pretrained is not None:
            model = _with_weights(model, pretrained)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train()


def _load(folder: Path, network: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return from_files(AutoModelForCausalLM, folder, config=network)
    except Exception as error:  # what safetensors' Rust raises has no type of its own
        raise ValueError(
            f"model.pretrained must name a folder with a model's whole weights; '{folder}' gave: "
            f"{' '.join(str(error).split())} Save them again with save_pretrained."
        ) from error


def from_files(kind: Any, source: Path | None, **options: Any) -> nn.Module:
    """What a transformers class makes in float32 of a folder, or of weights among the options.

    Raises:
        ValueError: some weights are missing.
        Exception: whatever transformers raises.
    """
    from transformers.utils.logging import disable_progress_bar

    # Loading draws a bar on every process.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model, found = kind.from_pretrained(
        source,
        local_files_only=True,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"it lacks {len(missing)} of the model's weights, {missing[0]!r} first.")
    made: nn.Module = model
    return made


def _with_weights(model: nn.Module, run: Path) -> nn.Module:
    """The network with a run's weights, its adapters merged into them."""
    adapters, weights = adapters_of(run), weights_of(run)
    holder: Any = model if adapters is None else with_adapters(model, adapters)
    try:
        holder.load_state_dict(weights, strict=False)  # of tied weights the first name is saved
    except RuntimeError as error:
        raise ValueError(f"the weights of '{run}' must fit its model: {error}") from error
    missing = [name for name, _ in holder.named_parameters() if name not in weights]
    if missing:
        raise ValueError(
            f"the weights of '{run}' must be those of its model; {missing[0]!r} is missing. Was "
            "its folder mixed up with another run's?"
        )
    merged: nn.Module = holder if adapters is None else holder.merge_and_unload()
    return merged


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
    head = chunking_head(model)
    if head is not None:
        return head.sum_of_losses(model, inputs, labels)
    logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
    )

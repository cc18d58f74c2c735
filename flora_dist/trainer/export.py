# SPDX-License-Identifier: Apache-2.0
"""A run's weights for others: a folder that transformers loads, and a look at what it writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.model import build_model, read_network
from flora_dist.trainer.optional_imports import needs_train_extra, stay_offline
from flora_dist.trainer.trained import card_of, is_run


def export(run: Path, target: Path) -> Path:
    """Write a run's newest weights, config and tokenizer for `from_pretrained`; the target.

    Raises:
        ValueError: no run, no checkpoint, a damaged one, or a target that is there.
    """
    if target.exists():
        raise ValueError(f"an export overwrites nothing; '{target}' exists. Name another folder.")
    if not is_run(run):
        raise ValueError(
            f"an export takes the folder of a run; '{run}' is none. Name "
            "<output.folder>/<output.name>."
        )
    model, tokenizer = _load(run)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        return partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def generate(path: Path, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and what a model writes after it.

    Args:
        path: a run, or a folder that `save_pretrained` wrote.
        prompt: where it begins; not empty.
        tokens: at most so many more.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.

    Raises:
        ValueError: no such model, a damaged one, numbers out of range, or more tokens than the
            model has positions.
    """
    if not prompt or tokens < 1 or not 0.0 <= temperature < float("inf"):
        raise ValueError(
            "generating needs a prompt of one character or more, at least one token and a "
            f"temperature that is finite and not below 0; it got {prompt!r}, {tokens} and "
            f"{temperature}. Correct --prompt, --tokens or --temperature."
        )
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"--seed must lie in [-2^63, 2^64); it is {seed}. Correct it.")
    model, tokenizer = _load(path)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    _check_positions(model.config, inputs["input_ids"].shape[1], tokens)
    torch.manual_seed(seed)
    sampling = {"temperature": temperature} if temperature else {}
    with torch.no_grad():
        written = model.eval().generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            do_sample=temperature > 0.0,
            **sampling,
        )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def _check_positions(network: Any, given: int, more: int) -> None:
    """Raise where tokens would stand at positions that the network was never trained at."""
    positions = getattr(network, "max_position_embeddings", None)
    if positions is None or given + more <= positions:
        return
    room = positions - given
    remedy = f"Lower --tokens to {room} or less" if room > 0 else "Shorten the prompt"
    raise ValueError(
        f"a model writes within its {positions} positions; the prompt has {given} tokens and "
        f"--tokens asks for {more} more. {remedy}."
    )


def _load(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run or of a folder that `save_pretrained` wrote."""
    stay_offline()
    with needs_train_extra():
        from transformers import AutoTokenizer
    card = card_of(path)
    model = build_model(ModelConfig(pretrained=str(path)), read_network(card), seed=0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            card, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what the tokenizers' Rust raises has no type of its own
        raise ValueError(
            f"a trained model's folder must hold its tokenizer; '{card}' gave: "
            f"{' '.join(str(error).split())} Save one there with tokenizer.save_pretrained."
        ) from error
    return model, tokenizer

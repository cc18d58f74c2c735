# SPDX-License-Identifier: Apache-2.0
"""Small models of many architectures, and batches for them: what real parameters look like.

Tied and shared embeddings, Conv1D, 3-D experts, convolutions, state spaces, one key head for two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]
WIDTH, VOCABULARY, SAMPLES, LENGTH = 32, 48, 8, 12
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
EXPERTS: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "num_experts_per_tok": 2}


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=generator)


def text(model: nn.Module) -> tuple[nn.Module, Batch]:
    return model, {"input_ids": tokens(), "labels": tokens()}


def llama(**more: Any) -> tuple[nn.Module, Batch]:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **more)
    return text(transformers.LlamaForCausalLM(config))


def gpt2() -> tuple[nn.Module, Batch]:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY}
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return text(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **without)))


def t5() -> tuple[nn.Module, Batch]:
    config = transformers.T5Config(
        d_model=WIDTH,
        d_kv=16,
        d_ff=40,
        num_layers=2,
        num_heads=2,
        vocab_size=VOCABULARY,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return text(transformers.T5ForConditionalGeneration(config))


def bert() -> tuple[nn.Module, Batch]:
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return text(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **without)))


def mixtral() -> tuple[nn.Module, Batch]:
    config = transformers.MixtralConfig(**EXPERTS, num_local_experts=4)
    return text(transformers.MixtralForCausalLM(config))


def qwen3_moe() -> tuple[nn.Module, Batch]:
    config = transformers.Qwen3MoeConfig(
        **EXPERTS, num_experts=4, moe_intermediate_size=24, head_dim=16
    )
    return text(transformers.Qwen3MoeForCausalLM(config))


def gemma3() -> tuple[nn.Module, Batch]:
    config = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16)
    return text(transformers.Gemma3ForCausalLM(config))


def mamba() -> tuple[nn.Module, Batch]:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = transformers.MambaConfig(**sizes, state_size=8, use_cache=False)
    return text(transformers.MambaForCausalLM(config))


def vit() -> tuple[nn.Module, Batch]:
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    labels = torch.arange(SAMPLES) % 5
    return transformers.ViTForImageClassification(config), {
        "pixel_values": pixels,
        "labels": labels,
    }


def whisper() -> tuple[nn.Module, Batch]:
    config = transformers.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(SAMPLES, 8, 20, generator=generator)
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": features, "labels": tokens()}


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "Llama, one key head": llama,
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "GPT-2": gpt2,
    "T5": t5,
    "BERT": bert,
    "Mixtral": mixtral,
    "Qwen3-MoE": qwen3_moe,
    "Gemma 3": gemma3,
    "Mamba": mamba,
    "ViT": vit,
    "Whisper": whisper,
}

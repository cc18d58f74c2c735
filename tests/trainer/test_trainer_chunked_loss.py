# SPDX-License-Identifier: Apache-2.0
"""Losses of some tokens at a time: loss and gradients are those of whole logits, which never are.

Runs under DDP, FSDP2 and ZeRO have losses in chunks in test_trainer_gradients.py and
test_trainer_engines.py, where their curves are compared with those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from flora_dist.trainer.arrange import arranged
from flora_dist.trainer.chunked_loss import chunk_loss
from flora_dist.trainer.config import Config
from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.data import IGNORED
from flora_dist.trainer.model import sum_of_losses

WORDS, SHAPE = 300, (3, 40)
SCALE = 0.01
"""Of the loss, as the loop divides by tokens."""


def network(family: str = "llama", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randint(WORDS, (2, *SHAPE), generator=generator)
    labels[0, 5:20] = IGNORED
    labels[2] = IGNORED
    return inputs, labels


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    loss = sum_of_losses(model, *batch())
    (SCALE * loss).backward()
    return float(loss.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def with_bias(model: Any) -> nn.Module:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, WORDS))
    return model


def with_a_frozen_head(model: Any) -> nn.Module:
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("tokens", [1, 7, 40, 10_000])
@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, None),
        ({}, with_bias),
        ({}, with_a_frozen_head),
    ],
    ids=["own head", "tied head", "bias", "frozen head"],
)
def test_loss_and_gradients_are_those_of_whole_logits(
    tokens: int, changes: dict[str, Any], change: Callable[[nn.Module], nn.Module] | None
) -> None:
    built = [network(**changes) for _ in range(2)]
    whole, chunked = built if change is None else map(change, built)
    chunk_loss(chunked, tokens)
    wanted, gradients = loss_and_gradients(whole)
    loss, found = loss_and_gradients(chunked)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 2e-6 * gradient.norm(), name
    with torch.no_grad():
        assert float(sum_of_losses(chunked, *batch())) == loss


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16_gradients_are_as_near_to_float32_as_those_of_whole_logits(
    weights: torch.dtype, tokens: int
) -> None:
    exact, whole, chunked = (with_bias(network()) for _ in range(3))
    chunk_loss(chunked, tokens)
    expected, wanted = loss_and_gradients(exact)
    for name in ("lm_head.weight", "lm_head.bias"):
        errors = []
        for model in (whole, chunked):
            model.to(weights).zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
                loss, gradients = loss_and_gradients(model)
            found = gradients[name]
            assert found.dtype == weights
            errors.append(float((found.float() - wanted[name]).norm() / wanted[name].norm()))
            assert loss == pytest.approx(expected, rel=1e-3)
        assert errors[1] < 1.25 * errors[0] < 0.05


class Largest(TorchDispatchMode):
    """The most elements that an operator has returned with a last dimension of all words."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.shape[-1:] == (WORDS,):
                self.elements = max(self.elements, leaf.numel())
        return found


def test_the_logits_of_more_tokens_than_a_chunk_never_exist() -> None:
    model = network()
    with Largest() as whole:
        loss_and_gradients(model)
    chunk_loss(model, 48)
    with Largest() as chunked:
        loss_and_gradients(model)
        with torch.no_grad():
            sum_of_losses(model, *batch())
    assert whole.elements == SHAPE[0] * SHAPE[1] * WORDS
    assert chunked.elements == 48 * WORDS


def test_logits_are_as_ever_where_no_loss_is_asked_for() -> None:
    whole, chunked = network(), network()
    chunk_loss(chunked, 16)
    inputs, _ = batch()
    assert torch.equal(chunked(inputs).logits, whole(inputs).logits)


def test_a_model_that_changes_its_logits_behind_the_head_is_refused() -> None:
    model = network("gemma2")
    chunk_loss(model, 16)
    with pytest.raises(ValueError, match=r"changes them afterwards.*Set it to null"):
        sum_of_losses(model, *batch())


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model: Any = network()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"head that is a linear layer; this model's is Seq"):
        arranged(model, ModelConfig(config="unread.json", loss_chunk=16))


def test_chunks_are_refused_where_the_heads_gradient_is_never_formed(
    tiny: Callable[..., Config],
) -> None:
    with pytest.raises(ValueError, match=r"model\.loss_chunk=16.*level: compressed"):
        tiny("optimizer={name: flora, lr: 1e-2}", "gradients.level=fused", "model.loss_chunk=16")


def test_a_model_whose_first_loss_shows_nothing_is_looked_at_again() -> None:
    model = network("gemma2")
    chunk_loss(model, 16)
    inputs, labels = batch()
    assert sum_of_losses(model, inputs, torch.full_like(labels, IGNORED)).item() == 0
    with pytest.raises(ValueError, match="changes them afterwards"):
        sum_of_losses(model, inputs, labels)


def test_a_loss_that_is_no_number_is_not_taken_for_a_changed_one() -> None:
    model = network()
    chunk_loss(model, 16)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(float("nan"))
    assert math.isnan(sum_of_losses(model, *batch()).item())

# SPDX-License-Identifier: Apache-2.0
"""Sketched linear layers in one process: what they compute, keep, leave alone and give back.

Sketches are those of `compressed` in float64, where only the order of sums of a few hundred
products differs: 1e-12.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import flora_dist
from flora_dist import Flora
from flora_dist.gradients.attach import Handle
from tests.gradients.small import SETTINGS, Small, attached, inputs

EQUAL = 1e-12
BFLOAT16 = 3e-3
"""X A^T and C are rounded to 8 bits, each by 1.1e-3 on average."""


class Layers(nn.Module):
    """Rows of 44, 24 and 20 elements, where blocks have 8, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(20, 44, bias=False)
        self.down = nn.Linear(44, 24)
        self.again = nn.Linear(24, 24)
        self.conv1d = Conv1D(20, 24)
        self.embed = nn.Embedding(13, 20)
        self.head = nn.Linear(20, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(self.up(x).tanh()).tanh()
        hidden = self.again(self.again(hidden).tanh())
        hidden = self.conv1d(hidden) + self.embed(torch.arange(x.shape[-2]) % 13)
        return self.head(hidden).square().mean()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=24, vocab_size=40, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def gpt2_loss(model: nn.Module, x: Tensor) -> Tensor:
    tokens = (x[..., :16].abs() * 10).long().reshape(-1, 16) % 40
    return model(input_ids=tokens, labels=tokens).loss


def plain_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def checkpointed_loss(model: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
    return checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)


def mixed_shapes_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) + model(x.flatten(0, 1)) + model(x.unsqueeze(0)[:, ::2])


def strided_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.transpose(0, 1)) + model(x.repeat_interleave(2, -1)[..., ::2])


def functional_loss(model: nn.Module, x: Tensor) -> Tensor:
    """A weight that is also read outside of its module."""
    return model(x) + functional.linear(x, model.up.weight).tanh().mean()  # type: ignore[arg-type, union-attr]


@dataclass(frozen=True, kw_only=True)
class Use:
    """A model and what is done with it."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]


USES = {
    "layers": Use(build=Layers, loss=plain_loss),
    "leading dims": Use(build=Layers, loss=mixed_shapes_loss),
    "strides": Use(build=Layers, loss=strided_loss),
    "read elsewhere too": Use(build=Layers, loss=functional_loss),
    "gpt2": Use(build=gpt2, loss=gpt2_loss),
    "reentrant checkpoint": Use(build=Layers, loss=partial(checkpointed_loss, use_reentrant=True)),
    "checkpoint": Use(build=Layers, loss=partial(checkpointed_loss, use_reentrant=False)),
}


EMBEDDINGS = {"embed", "transformer.wte", "transformer.wpe"}


def data(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, 20, generator=generator, dtype=torch.float64)


def sums_of(handle: Handle) -> dict[str, Tensor]:
    """C of each parameter so far."""
    flows = handle.gradients.flows
    sums = {name: flow.accumulator.sums_ENKR for name, flow in flows.items()}
    return {name: value.clone() for name, value in sums.items() if value is not None}


def trained(use: Use, level: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(C of two micro-batches, gradients of what is dense) at the last step."""
    model = use.build().double()
    optimizer = Flora(model.named_parameters(), **SETTINGS)
    handle = flora_dist.attach(model, optimizer, level, gradient_bits=32)
    for step in range(steps):
        for micro_batch in range(2):
            use.loss(model, data(2 * step + micro_batch)).backward()
        sums = sums_of(handle)
        dense = {
            n: p.grad.clone()
            for n, p in model.named_parameters()
            if p.ndim == 1 and p.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    return sums, dense


@pytest.mark.parametrize("name", USES)
def test_a_fused_sketch_is_the_compressed_one(name: str) -> None:
    use = USES[name]
    ours, theirs = trained(use, "fused", 3), trained(use, "compressed", 3)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for parameter, value in mine.items():
            assert (value - other[parameter]).norm() <= EQUAL * other[parameter].norm(), parameter


def test_the_sketch_is_that_of_the_gradient() -> None:
    model, dense = Small().double(), Small().double()
    _, handle = attached(model, "fused")
    x = inputs(0).double()
    model(x).backward()
    dense(x).backward()
    for name, sums in sums_of(handle).items():
        accumulator = handle.gradients.flows[name].accumulator
        (sketch_RB,) = accumulator.sketch(torch.device("cpu"))
        gradient = dense.get_parameter(name).grad
        assert gradient is not None
        rows, columns = gradient.shape
        for row in range(rows):
            for block in range(-(-columns // 8)):
                piece = gradient[row, 8 * block : 8 * block + 8]
                wanted = sketch_RB[:, : len(piece)] @ piece
                assert torch.allclose(sums[0, row, block], wanted, rtol=EQUAL, atol=EQUAL)


# ---- what is refused, left alone, given back


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    model = Small()
    optimizer, _ = attached(model, "fused")
    model(inputs(0)).backward()
    loss = model(inputs(1))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    model = Small()
    _optimizer, _ = attached(model, "fused")
    x = inputs(0).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_loaded_state_brings_its_own_basis() -> None:
    model = Small()
    optimizer, _ = attached(model, "fused")
    for step in range(3):
        model(inputs(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = Small()
    resumed, handle = attached(other, "fused")
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for each in (model, other):
        each(inputs(3)).backward()
    assert handle.gradients.flows["first.weight"].accumulator.step == 4
    optimizer.step()
    resumed.step()
    assert all(torch.equal(value, other.state_dict()[n]) for n, value in model.state_dict().items())


def test_weights_frozen_later_have_no_sketch() -> None:
    model = Small()
    _, handle = attached(model, "fused")
    model.extra.weight.requires_grad_(False)
    model(inputs(0)).backward()
    assert sums_of(handle).keys() == {"first.weight", "last.weight"}


def test_dtypes_that_a_module_refuses_are_refused() -> None:
    model = Small()
    _optimizer, _ = attached(model, "fused")
    with pytest.raises(RuntimeError, match="dtype"):
        model(inputs(0).double())


class Own(nn.Linear):
    """A subclass, which may do anything."""


def test_the_report_says_what_is_fused_and_why_the_rest_is_not() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(16, 16),
            "own": Own(16, 16),
            "embed": nn.Embedding(16, 16),
            "conv": nn.Conv1d(16, 16, 3),
            "tied": nn.Linear(16, 16),
            "patched": nn.Linear(16, 16),
            "hooked": nn.Linear(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
        }
    )
    model["tied"].weight = model["embed"].weight
    model["patched"].forward = lambda x: x
    model["hooked"].weight.register_hook(lambda gradient: 2 * gradient)
    _, handle = attached(model, "fused")
    rows = {row.name: row.how for row in handle.report().rows if row.is_sketched}
    per_block = {name: how.rpartition(", ")[0] for name, how in rows.items()}
    assert per_block == {
        "linear.weight": "fused",
        "own.weight": "compressed: weight of Own",
        "embed.weight": "fused; compressed: weight of Embedding",
        "conv.weight": "compressed: weight of Conv1d",
        "patched.weight": "compressed: Linear whose forward was replaced",
        "hooked.weight": "compressed: Linear with a hook on its weight",
        "attention.in_proj_weight": "compressed: in_proj_weight of MultiheadAttention",
        "attention.out_proj.weight": "compressed: weight of NonDynamicallyQuantizableLinear",
    }


def test_remove_gives_every_module_its_forward_back() -> None:
    model = Layers()
    before = [dict(module.__dict__) for module in model.modules()]
    x = data(0).float()
    wanted = model(x)
    _, handle = attached(model, "fused")
    assert torch.equal(model(x), wanted)
    kept = model.up.forward  # somebody may have wrapped it meanwhile
    model(x).backward()
    handle.remove()
    assert [module.__dict__.keys() for module in model.modules()] == [d.keys() for d in before]
    assert torch.equal(model(x), wanted)
    model.up.forward = kept
    model.zero_grad()
    model(x).backward()
    reference = Layers()
    reference(x).backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_copies_and_pickles_of_a_model_have_their_own_forward() -> None:
    model = Small()
    _, handle = attached(model, "fused")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2)
        assert not torch.equal(other(inputs(0)), model(inputs(0)))
        other(inputs(0)).backward()
        assert type(other.first.weight.grad) is Tensor
    assert not sums_of(handle)


def test_keywords_of_the_modules_work() -> None:
    model = Layers()
    _optimizer, _ = attached(model, "fused")
    x = torch.randn(2, 24)
    assert torch.equal(model.again(input=x), model.again(x))
    assert torch.equal(model.conv1d(x=x), model.conv1d(x))

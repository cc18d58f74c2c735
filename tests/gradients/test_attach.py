# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` refuses, what it restores, and what stands in ``.grad`` meanwhile."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_dist
from flora_dist import Flora
from flora_dist.gradients.placeholder import CompressedGradient, stands_in
from tests.gradients import small
from tests.gradients.small import Small, attached, inputs


@pytest.fixture
def started() -> tuple[Small, Flora]:
    """A model after one backward."""
    model = Small()
    optimizer, _ = attached(model)
    model(inputs(0)).backward()
    return model, optimizer


def test_no_full_gradient_is_left_after_backward(started: tuple[Small, Flora]) -> None:
    model, _ = started
    sketched = {n for n, p in model.named_parameters() if isinstance(p.grad, CompressedGradient)}
    assert sketched == {"first.weight", "extra.weight", "last.weight"}
    assert all(p.grad is not None for p in model.parameters())
    # It has a shape and no memory.
    assert model.first.weight.grad is not None
    assert model.first.weight.grad.shape == model.first.weight.shape
    with pytest.raises(RuntimeError):
        model.first.weight.grad.untyped_storage().data_ptr()


READS: dict[str, Callable[[Small], Any]] = {
    "clip_grad_norm_": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    "clip_grad_norm_ foreach": lambda m: nn.utils.clip_grad_norm_(
        m.parameters(), 1.0, foreach=True
    ),
    "clip_grad_value_": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1.0),
    "get_total_norm": lambda m: nn.utils.get_total_norm([p.grad for p in m.parameters()]),
    "an optimizer of torch": lambda m: torch.optim.SGD(m.parameters(), lr=0.1).step(),
    "reading": lambda m: m.first.weight.grad.sum(),
    "a copy elsewhere": lambda m: m.first.weight.grad.to(torch.float64),
}


@pytest.mark.parametrize("name", READS)
def test_what_reads_a_sketched_gradient_raises(name: str, started: tuple[Small, Flora]) -> None:
    model, _ = started
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"kept as sketches.*optimizer\.clip_grad_norm_"):
        READS[name](model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_grad_scaler_is_refused() -> None:
    model = Small()
    optimizer, _ = attached(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(inputs(0))).backward()
    with pytest.raises(RuntimeError, match="in place of GradScaler use bf16"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_what_was_sketched(set_to_none: bool) -> None:
    model = Small()
    optimizer, _ = attached(model)
    model(inputs(7)).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    model(inputs(0)).backward()
    optimizer.step()
    other = Small()
    plain, _ = attached(other)
    other(inputs(0)).backward()
    plain.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_consumes_the_gradients(started: tuple[Small, Flora]) -> None:
    model, optimizer = started
    optimizer.step()
    assert not any(stands_in(p.grad) for p in model.parameters())
    before = model.first.weight.detach().clone()
    optimizer.step()  # 1-D gradients are the framework's: they stay, as in torch
    assert torch.equal(model.first.weight, before)
    assert optimizer.state[model.first.weight]["step"] == 1


def test_a_gradient_after_the_norm_is_refused(started: tuple[Small, Flora]) -> None:
    model, optimizer = started
    optimizer.grad_norm()
    with pytest.raises(RuntimeError, match=r"once per step.*after\s+the last micro-batch"):
        model(inputs(1)).backward()


def test_a_step_may_be_given_up_after_its_norm(started: tuple[Small, Flora]) -> None:
    model, optimizer = started
    optimizer.grad_norm()
    optimizer.zero_grad()
    model(inputs(1)).backward()
    norm = optimizer.grad_norm()
    other = Small()
    fresh, _ = attached(other)
    other(inputs(1)).backward()
    assert torch.equal(norm, fresh.grad_norm())


def test_adding_to_a_sketched_gradient_adds_to_its_sketch(started: tuple[Small, Flora]) -> None:
    model, optimizer = started
    gradient = torch.randn(model.last.weight.shape)
    assert model.last.weight.grad is not None
    with torch.no_grad():
        model.last.weight.grad += gradient
    flows = optimizer.gradients.flows  # type: ignore[attr-defined]
    sums_ENKR = flows["last.weight"].accumulator.sums_ENKR
    assert sums_ENKR is not None
    model.zero_grad()
    model(inputs(0)).backward()
    again = flows["last.weight"].accumulator.sums_ENKR
    assert again is not None
    assert (sums_ENKR - again).norm() > 0.1 * gradient.norm()


def test_a_full_gradient_written_by_hand_is_refused(started: tuple[Small, Flora]) -> None:
    model, optimizer = started
    model.last.weight.grad = torch.ones_like(model.last.weight)
    with pytest.raises(RuntimeError, match=r"no full gradient may be left.*'last\.weight'"):
        optimizer.step()


def test_a_second_attach_is_the_same_one() -> None:
    model = Small()
    optimizer, handle = attached(model)
    assert flora_dist.attach(model, optimizer, "compressed", gradient_bits=32) is handle
    with pytest.raises(ValueError, match=r"in one way.*remove\(\)"):
        flora_dist.attach(model, optimizer, "compressed", gradient_rank=4)


def test_a_gradient_that_another_handle_takes_is_refused() -> None:
    model = Small()
    _earlier, handle = attached(model)
    optimizer = Flora(model.named_parameters(), **small.SETTINGS)
    with pytest.raises(ValueError, match=r"an earlier attach\(\) to another. Call remove\(\)"):
        flora_dist.attach(model, optimizer, "compressed")
    handle.remove()
    flora_dist.attach(model, optimizer, "compressed")


@pytest.mark.parametrize("level", ["compressed", "fused"])
def test_an_optimizer_that_is_gone_keeps_no_gradient_from_the_next(level: str) -> None:
    model = Small()
    attached(model, level)
    gc.collect()
    optimizer, handle = attached(model, level)
    assert sum(row.how.startswith(level) for row in handle.report().rows) == 3
    model(inputs(0)).backward()
    optimizer.step()


def test_remove_restores_dense_gradients() -> None:
    model = Small()
    optimizer, handle = attached(model)
    model(inputs(0)).backward()
    handle.remove()
    assert not any(stands_in(p.grad) for p in model.parameters())
    model.zero_grad()
    model(inputs(0)).backward()
    optimizer.step()
    other = Small()
    dense = Flora(other.named_parameters(), **small.SETTINGS)
    other(inputs(0)).backward()
    dense.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert optimizer.report().level == "dense"


def test_the_level_of_a_state_cannot_change_unnoticed() -> None:
    model = Small()
    optimizer, handle = attached(model)
    model(inputs(0)).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    handle.remove()
    model(inputs(1)).backward()
    with pytest.raises(ValueError, match=r"must have gradients='dense'; it has 'compressed'"):
        optimizer.step()
    dense = Flora(Small().named_parameters(), **small.SETTINGS)
    with pytest.raises(ValueError, match=r"must have gradients='dense'; it has 'compressed'"):
        dense.load_state_dict(saved)
    # Back to the level it was made with: how sketches came about is no other algorithm.
    flora_dist.attach(model, optimizer, "sharded")
    model.zero_grad()
    model(inputs(1)).backward()
    optimizer.step()


def test_dense_state_is_not_taken_for_sketched() -> None:
    model = Small()
    optimizer = Flora(model.named_parameters(), **small.SETTINGS)
    model(inputs(0)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"must have gradients='compressed'; it has 'dense'"):
        flora_dist.attach(model, optimizer, "compressed")
    model.zero_grad()
    model(inputs(1)).backward()
    optimizer.step()  # as if nothing had been asked


def test_loading_between_backward_and_step_is_noticed() -> None:
    model = Small()
    optimizer, _ = attached(model)
    for step in range(2):
        model(inputs(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            saved = copy.deepcopy(optimizer.state_dict())
    model(inputs(2)).backward()
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"basis of the coming step.*zero_grad\(\) after load"):
        optimizer.step()
    optimizer.zero_grad()
    model(inputs(2)).backward()
    optimizer.step()


REFUSED: dict[str, tuple[Callable[[Small, Flora], Any], str]] = {
    "a level": (lambda m, o: flora_dist.attach(m, o, "squeezed"), "must be one of sharded"),
    "dense": (lambda m, o: flora_dist.attach(m, o, "dense"), "do not call attach"),
    "a wire dtype": (
        lambda m, o: flora_dist.attach(m, o, "compressed", wire_dtype="float16"),
        "float32, bfloat16",
    ),
    "a rank": (
        lambda m, o: flora_dist.attach(m, o, "compressed", gradient_rank=8),
        "rank must be below block",
    ),
    "no rank": (
        lambda m, o: flora_dist.attach(m, o, "compressed", gradient_rank=0),
        "rank must be a whole number",
    ),
    "another model": (
        lambda _, o: flora_dist.attach(Small(), o, "compressed"),
        "belong to the model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_and_nothing_has_changed(name: str) -> None:
    model = Small()
    optimizer = Flora(model.named_parameters(), **small.SETTINGS)
    action, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        action(model, optimizer)
    model(inputs(0)).backward()
    assert not any(stands_in(p.grad) for p in model.parameters())
    flora_dist.attach(model, optimizer, "compressed")


def test_a_matrix_unfrozen_later_is_refused_until_attached_again() -> None:
    model = Small()
    model.extra.weight.requires_grad_(False)
    optimizer, handle = attached(model)
    model(inputs(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.extra.weight.requires_grad_(True)
    model(inputs(1)).backward()
    before = model.first.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'extra\.weight' was\s+added or unfrozen since"):
        optimizer.step()
    assert torch.equal(model.first.weight, before)
    handle.remove()
    flora_dist.attach(model, optimizer, "compressed")
    model.zero_grad()
    model(inputs(1)).backward()
    optimizer.step()
    assert optimizer.state[model.extra.weight]["step"] == 1


def test_another_optimizer_is_refused() -> None:
    model = Small()
    adamw: Any = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="needs a Flora; got AdamW"):
        flora_dist.attach(model, adamw, "compressed")


def test_the_report_says_what_is_sketched_and_what_it_keeps() -> None:
    model = Small()
    _, handle = attached(model, gradient_rank=1)
    report = handle.report()
    rows = {row.name: row for row in report.rows}
    model(inputs(0)).backward()
    for name, flow in handle.gradients.flows.items():
        sums_ENKR = flow.accumulator.sums_ENKR
        assert sums_ENKR is not None
        assert rows[name].held_bytes == sums_ENKR.numel() * 4
        assert rows[name].sent_bytes == 0  # there is nobody to send to
    assert rows["first.weight"].how == "compressed, 1 per block of 8"
    assert rows["norm.bias"].how == "dense: 1-D"
    assert report.level == "compressed"
    assert str(report).splitlines()[-1].startswith("all")


def test_a_closure_runs_before_gradients_are_read() -> None:
    model, other = Small(), Small()
    with_closure, without = attached(model)[0], attached(other)[0]

    def closure() -> Tensor:
        with_closure.zero_grad()
        loss = model(inputs(0))
        loss.backward()
        return loss

    loss = with_closure.step(closure)
    other(inputs(0)).backward()
    without.step()
    assert torch.equal(loss.detach(), Small()(inputs(0)).detach())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)

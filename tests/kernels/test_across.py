# SPDX-License-Identifier: Apache-2.0
"""A step whose sums travel goes by two calls, with the bits of one phase by phase."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_dist import Flora
from flora_dist.core.layouts.flat import FlatLayout, cut_line
from flora_dist.core.step.plan import Plan
from flora_dist.kernels import at_once
from tests.kernels.paths import path

# Spans of two ranks meet inside a block of the second matrix, of three inside the experts too.
SHAPES = {
    "a": (40, 50),
    "b": (29, 100),
    "experts": (4, 10, 40),
    "norm": (50,),
    "c": (16, 64),
    "d": (16, 64),
}
STEPS = 3
SETTINGS = {
    "plain": {"momentum": "blend"},
    "old momentum": {"momentum": "flora", "kappa": 2},
    "no clip": {"momentum": "blend", "clip": None},
    "rates by weights": {"momentum": "none", "scale_parameter": True, "maximize": True},
    "relative rates": {"momentum": "blend", "scale_parameter": "relative"},
    "two moments": {"momentum": "subspace_adam", "kappa": 2},
    "bfloat16": {"momentum": "flora", "state_dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Alone:
    """A reducer whose other ranks hold zeros; how often it sends."""

    rank: int
    sent: list[str] = field(default_factory=list, compare=False)

    def sum_(self, message_S: Tensor) -> None:
        assert message_S.ndim == 1
        self.sent.append("sum")

    def exchange(self, sent_S: Tensor, sizes: Mapping[int, int]) -> Tensor:
        assert sent_S.numel() == sum(sizes.values())
        self.sent.append("exchange")
        return torch.zeros_like(sent_S)


def step(rank: int, ranks: int, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights and state of a rank's span after some steps, and what it sent in the last."""
    torch.manual_seed(rank)
    offsets = [0, *torch.tensor([math.prod(s) for s in SHAPES.values()]).cumsum(0).tolist()]
    size = -(-offsets[-1] // ranks)
    spans = cut_line(
        list(SHAPES.items()), offsets=offsets[:-1], size=size, rank=rank, world_size=ranks
    )
    flat = (0.1 * torch.randn(size, dtype=torch.float32)).requires_grad_()
    reducer, layout = Alone(rank), FlatLayout()
    layout.add(flat, spans, rank=rank, reducer=reducer)
    optimizer = Flora([flat], lr=1e-2, rank=4, block=16, **settings)
    optimizer.attach_layout(layout, [[flat]])
    with contextlib.redirect_stderr(io.StringIO()):  # the report
        for _ in range(STEPS):
            reducer.sent.clear()
            flat.grad = torch.randn(size, dtype=torch.float32)
            optimizer.step()
    found = {"flat": flat.detach()}
    for name, own in optimizer.state[flat].items():
        found |= {f"{name}.{k}": v for k, v in own.items() if isinstance(v, Tensor)}
    return found, reducer.sent


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that finish a step."""
    calls: list[str] = []
    original: Callable[..., None] = at_once.NativeAcross.finish

    def finish(*given: Any) -> None:
        calls.append("finish")
        original(*given)

    monkeypatch.setattr(at_once.NativeAcross, "finish", finish)
    return calls


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (1, 3)])
def test_a_step_in_two_calls_has_the_bits_of_one_by_phases(
    rank: int, ranks: int, settings: dict[str, Any], counted: list[str]
) -> None:
    with path("native"):
        in_two, sent = step(rank, ranks, settings)
        assert len(counted) == STEPS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Plan, "_find_at_once", lambda _: None)
            by_phases, _ = step(rank, ranks, settings)
    assert len(counted) == STEPS
    assert sent == (["sum"] if ranks == 2 else ["exchange", "sum"])
    assert [key for key in in_two if not torch.equal(in_two[key], by_phases[key])] == []


@pytest.mark.parametrize(
    "settings",
    [{"momentum": "blend"}, {"momentum": "flora_strict"}, {"momentum": "none", "clip": None}],
    ids=str,
)
def test_a_step_does_not_depend_on_the_default_dtype(settings: dict[str, Any]) -> None:
    with path("native"):
        expected, _ = step(0, 2, settings)
        torch.set_default_dtype(torch.float64)
        try:
            found, _ = step(0, 2, settings)
        finally:
            torch.set_default_dtype(torch.float32)
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("momentum", ["blend", "flora", "flora_strict"])
def test_torch_and_kernels_agree_on_spans(momentum: str) -> None:
    runs = []
    for name in ("torch", "native"):
        with path(name):
            runs.append(step(1, 3, {"momentum": momentum})[0])
    for key, expected in runs[0].items():
        torch.testing.assert_close(runs[1][key], expected, rtol=2e-5, atol=2e-6, msg=key)

# SPDX-License-Identifier: Apache-2.0
"""`fused` is `compressed` on every layout, and so the run of ``reference.py``.

The zoo has ragged rows, a tied embedding and head, biases, frozen and narrow weights, a batch of
experts and a convolution. Against `compressed` only sums of a few hundred products change their
order, grown by ten steps: 3e-15 was seen, so 1e-12.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flora_dist.core.sketch import matrices
from flora_dist.gradients import fused
from flora_dist.gradients import fused_linear as linear
from tests.battery import zoo
from tests.battery.oracle import distances, trainable
from tests.battery.test_layouts import EXACT, FLOAT_MODEL, FLOAT_PARAMETER
from tests.battery.wrapped import parallelize
from tests.conftest import pool_of
from tests.gradients import layouts
from tests.gradients.oracle import SketchedCase, Weights, reference_run
from tests.gradients.small import Small, attached, inputs, my_inputs

EQUAL = 1e-12
LAYOUTS = ("plain", "ddp x2", "compiled ddp x2", "fsdp2 x2", "fsdp2 x3", "tp x2")
SAMPLES = 36  # divisible by 1, 2 and 3 ranks times 3 micro-batches


def case_of(level: str = "fused", **more: Any) -> SketchedCase:
    return SketchedCase(**{"settings": {"momentum": "flora"}, "level": level, **more})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_is_compressed_on_every_layout(layout: str) -> None:
    pool = pool_of(layouts.LAYOUTS[layout][0])
    wanted, norms = pool(
        layouts.run, layout, case_of("compressed", micro_batches=3, samples=SAMPLES)
    )[0]
    everyone = pool(layouts.run, layout, case_of(micro_batches=3, samples=SAMPLES))
    for weights, their_norms in everyone:
        assert their_norms == everyone[0][1]
        assert all(torch.equal(weights[name], everyone[0][0][name]) for name in weights)
    _, worst = distances(trainable(zoo.build(torch.float64)), wanted, everyone[0][0])
    assert worst < EQUAL
    assert everyone[0][1] == pytest.approx(norms, rel=EQUAL)


@pytest.mark.parametrize(
    "options",
    [
        {"settings": {"momentum": "blend"}},
        {"settings": {"momentum": "flora_strict", "sketch": "gaussian"}, "gradient_rank": 4},
        {"settings": {"momentum": "none", "sketch": "rademacher"}, "max_norm": 0.125},
        {"settings": {"momentum": "flora", "block": "full", "sketch": "gaussian"}},
    ],
    ids=str,
)
def test_fused_equals_the_reference(options: dict[str, Any]) -> None:
    case = case_of(**options)
    start, expected, norms = reference_run(case)
    weights, ours = layouts.run("plain", case)
    assert distances(start, expected, weights)[1] < EXACT
    assert ours == pytest.approx(norms, rel=EXACT)


def test_fused_equals_the_reference_in_float32() -> None:
    case = case_of(dtype=torch.float32)
    start, expected, _ = reference_run(case)
    whole, worst = distances(start, expected, pool_of(2)(layouts.run, "fsdp2 x2", case)[0][0])
    assert whole < FLOAT_MODEL
    assert worst < FLOAT_PARAMETER


# ---- faults


def test_sketches_in_the_basis_of_a_past_step_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    refresh = fused._Carrier.refresh

    def once(self: fused._Carrier) -> None:
        if self._step == 0:
            refresh(self)

    monkeypatch.setattr(fused._Carrier, "refresh", once)
    with pytest.raises(RuntimeError, match="must be in the basis of the coming step"):
        layouts.run("plain", case_of())


def wrong_basis(self: fused._Carrier) -> None:
    """A of a step of its own, said to be that of the coming one."""
    accumulator = self._weight.flow.accumulator
    (sketch_RB,) = accumulator._sketches.at(1000, accumulator.dtype, self.unit_RB.device)
    with torch.no_grad():
        self.unit_RB.copy_(sketch_RB / self.scale)
    self._step = accumulator.next_step


def unscaled(ctx: Any, rows_TN: Tensor, sketched_TS: Tensor) -> Tensor:
    return (rows_TN.t() @ sketched_TS).view(ctx.like[0])


def lost(self: fused._Carrier, sketched_NKR: Tensor) -> None:
    """Every second sketch."""
    self._turn = 1 - getattr(self, "_turn", 0)  # type: ignore[attr-defined]
    gradients = self._gradients()
    if self._turn and gradients is not None:
        gradients.take_sketch(self._weight.flow, sketched_NKR, self._step)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "basis": (fused._Carrier, "refresh", wrong_basis),
    "scale": (linear, "_sketch", unscaled),
    "micro-batches": (fused._Carrier, "take", lost),
}


BROKEN = case_of(micro_batches=2)


@cache
def expected_of_broken() -> tuple[Weights, Weights, list[float]]:
    return reference_run(BROKEN)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_mechanism_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, expected, norms = expected_of_broken()
    monkeypatch.setattr(*FAULTS[fault])
    weights, ours = layouts.run("plain", BROKEN)
    _, worst = distances(start, expected, weights)
    norm = max(abs(a - b) / b for a, b in zip(ours, norms, strict=True))
    assert max(worst, norm) > 1e6 * EXACT


# ---- speed


@pytest.mark.parametrize("level", ["compressed", "fused"])
def test_sketches_of_a_step_are_drawn_in_one_pass(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counted(kind: str, **more: Any) -> Tensor:
        passes.append(len(more["keys"]))
        return draw(kind, **more)

    draw = matrices.sketch_matrices
    model = Small()
    optimizer, _ = attached(model, level, {"momentum": "none"})
    model(inputs(0)).backward()
    monkeypatch.setattr(matrices, "sketch_matrices", counted)
    optimizer.step()
    optimizer.zero_grad()
    model(inputs(1)).backward()
    assert passes == [3]


# ---- FSDP2


def places_under_tensor_parallelism() -> dict[str, str]:
    model = zoo.build(torch.float32)
    parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    _, handle = attached(model, "fused")
    return {row.name: row.how.partition(", ")[0] for row in handle.report().rows}


@pytest.mark.ranks(2)
def test_weights_cut_by_tensor_parallelism_stay_compressed() -> None:
    for places in pool_of(2)(places_under_tensor_parallelism):
        assert places["up.weight"] == "compressed: Linear with a part of its weight"
        assert places["single.weight"] == "fused"


def memory_of_a_weight() -> list[int]:
    """Bytes of the gathered weight of a unit: during forward, and when it is over."""
    model = Small()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _optimizer, _ = attached(model, "fused")
    gathered: list[Tensor] = []
    sizes: list[int] = []

    def look(module: nn.Linear, _: Any) -> None:
        gathered.append(module.weight)
        sizes.append(module.weight.untyped_storage().nbytes())

    model.first.register_forward_pre_hook(look)
    loss = model(my_inputs(0))
    sizes.append(gathered[0].untyped_storage().nbytes())
    loss.backward()
    return sizes


@pytest.mark.ranks(2)
def test_fsdp2_can_free_a_weight_between_forward_and_backward() -> None:
    for sizes in pool_of(2)(memory_of_a_weight):
        assert sizes == [24 * 20 * 4, 0]


def sketches_in_bfloat16(level: str) -> dict[str, Tensor]:
    """Mean sketches of a backward with weights and inputs in bfloat16."""
    model = Small()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model.first, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _, handle = attached(model, level)
    model(my_inputs(0, rows=256)).backward()
    handle.gradients.reduce()
    means = {name: handle.gradients.mean_of(name) for name in handle.gradients.flows}
    return {name: mean.tiles[0] for name, mean in means.items() if mean is not None}


@pytest.mark.ranks(2)
def test_mixed_precision_of_fsdp2_rounds_no_more_than_the_gradient() -> None:
    # Rounding of X A^T and of C against that of G: 1.2e-3 each on average, so 3e-3 together.
    for ours, theirs in zip(
        pool_of(2)(sketches_in_bfloat16, "fused"),
        pool_of(2)(sketches_in_bfloat16, "compressed"),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        for name, sketch in ours.items():
            assert sketch.dtype == torch.float32
            assert (sketch - theirs[name]).norm() < 3e-3 * theirs[name].norm(), name

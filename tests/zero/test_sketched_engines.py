# SPDX-License-Identifier: Apache-2.0
"""Engines that sketch gradients: what they send, save and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flora_dist.deepspeed
from tests.bench.wire_counter import Collectives
from tests.conftest import launched_pool_of
from tests.zero.small import (
    OUTPUTS,
    WIDTH,
    batch,
    build,
    config_of,
    start,
    train,
    weights,
)
from tests.zero.test_checkpoint import contents

pytestmark = pytest.mark.deepspeed

COMPRESSED = {"flora": {"gradients": "compressed", "gradient_bits": 32}}
CLOSE = 1e-6
"""Of weights around 0.1 after some steps of 1e-2; fp32 in another order."""


# ---- what is sent


class Wide(nn.Module):
    """Matrices of 256 x 512 and one bias: dense vectors do not decide the count."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(256, 512, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(512, 256, bias=index == 0) for index in range(3))

    def forward(self, x_NI: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x_NI = x_NI + down(up(x_NI).tanh())
        return x_NI.square().mean()


def reduced(flora: dict[str, Any]) -> int:
    """Elements of gradients, or of sketches, that this rank gives to collectives in a step."""
    optimizer = {"type": "Flora", "params": {"lr": 1e-3, "rank": 4, "block": 64}}
    config = config_of(2, optimizer=optimizer, gradient_accumulation_steps=4, flora=flora)
    engine, _ = start(config, model=Wide())
    collectives = Collectives()
    for step in range(8):
        if step == 4:
            collectives.sent.clear()
        with collectives, collectives.sketches():
            loss = engine(torch.ones(2, 256))
            with collectives.backward():
                engine.backward(loss)
            engine.step()
    engine.destroy()
    return collectives.elements("gradients") + collectives.elements("sketches")


def test_four_micro_batches_at_ratio_16_reduce_fifty_times_less_than_zero_2() -> None:
    pool = launched_pool_of(2)
    everything = 6 * 256 * 512 + 256
    assert pool(reduced, {}) == [4 * everything] * 2
    # A sixteenth once and the bias four times. To each of two ranks also who has a gradient, a
    # block that both keep (4), and padding to the longer share: the row that the border cuts (32).
    for elements in pool(reduced, COMPRESSED["flora"]):
        assert 0 <= elements - (6 * 256 * 512 // 16 + 4 * 256) <= 2 * (6 + 4 + 32)
        assert 4 * everything / elements > 50


# ---- ways to run an engine


class Checkpointed(nn.Module):
    """Its middle is computed again in backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 37)
        self.down = nn.Linear(37, OUTPUTS)

    def forward(self, x_NI: Tensor) -> Tensor:
        x_NI = self.first(x_NI)
        if self.how == "plain":
            inner = self.middle(x_NI)
        else:
            inner = checkpoint(self.middle, x_NI, use_reentrant=self.how == "reentrant")
        return self.down(inner).square().mean()

    def middle(self, x_NI: Tensor) -> Tensor:
        return self.up(x_NI).tanh()


def checkpointed(how: str) -> nn.Module:
    torch.manual_seed(0)
    return Checkpointed(how)


Way = Callable[[Any, int], None]


def by_the_engine(engine: Any, step: int) -> None:
    for micro in (2 * step, 2 * step + 1):
        engine.backward(engine(batch(micro)))
        engine.step()


def by_torch(engine: Any, step: int) -> None:
    for micro in (2 * step, 2 * step + 1):
        engine(batch(micro)).backward()
        engine.step()


def coalesced(engine: Any, step: int) -> None:
    with engine.coalesce_grad_reduction():
        for micro in (2 * step, 2 * step + 1):
            engine.backward(engine(batch(micro)))
    engine.micro_steps += 1
    engine.step()


def unmanaged(engine: Any, step: int) -> None:
    for micro in (2 * step, 2 * step + 1):
        engine.backward(engine(batch(micro)))
    engine.step()


def followed(
    way: Way, stage: int, model: str = "plain", **blocks: Any
) -> tuple[dict[str, Tensor], float]:
    """Weights after four steps of two micro-batches, and the last norm."""
    config = config_of(stage, gradient_accumulation_steps=2, **{**COMPRESSED, **blocks})
    engine, _ = start(config, model=checkpointed(model))
    for step in range(4):
        way(engine, step)
    found = weights(engine), float(engine.get_global_grad_norm())
    engine.destroy()
    return found


def ways(stage: int) -> dict[str, float]:
    """How far each way of running an engine is off."""
    expected, norm = followed(by_the_engine, stage)
    fused = {"flora": {"gradients": "fused"}}
    runs = {
        "loss.backward()": followed(by_torch, stage),
        "coalesced": followed(coalesced, stage),
        "unmanaged": followed(unmanaged, stage, managed_gradient_accumulation=False),
        "reentrant": followed(by_the_engine, stage, "reentrant"),
        "checkpointed": followed(by_the_engine, stage, "not reentrant"),
        "fused": followed(by_the_engine, stage, **fused),
        "fused, reentrant": followed(by_the_engine, stage, "reentrant", **fused),
    }
    return {
        name: max(
            abs(last - norm), *(float((w - found[n]).abs().max()) for n, w in expected.items())
        )
        for name, (found, last) in runs.items()
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_every_way_to_run_an_engine_is_the_same_run(stage: int) -> None:
    distances = launched_pool_of(2)(ways, stage)[0]
    assert all(distance < CLOSE for distance in distances.values()), distances


def norm_of_sums(stage: int, op: str) -> float:
    engine, _ = start(config_of(stage, gradient_allreduce_op=op, **COMPRESSED))
    train(engine, range(1))
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return norm


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_deepspeed_sums_are_summed(stage: int) -> None:
    mean, total = (launched_pool_of(2)(norm_of_sums, stage, op)[0] for op in ("mean", "sum"))
    assert total == pytest.approx(2 * mean, rel=CLOSE)


# ---- checkpoints


def resumed(stage: int, level: str, folder: str) -> None:
    blocks = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2}
    config = config_of(stage, flora={"gradients": level}, **blocks)
    engine, flora = start(config)
    train(engine, range(8))  # a window and a step
    engine.save_checkpoint(folder)
    saved = contents(flora)
    train(engine, range(8, 16))

    again, loaded = start(config, model=build(seed=7))
    again.load_checkpoint(folder)
    assert contents(loaded) == saved
    train(again, range(8, 16))
    assert contents(loaded) == contents(flora)
    found = weights(again)
    assert all(torch.equal(found[name], weight) for name, weight in weights(engine).items())


@pytest.mark.parametrize(("stage", "level"), [(0, "fused"), (2, "compressed"), (3, "fused")])
def test_a_loaded_run_goes_on_bit_for_bit(stage: int, level: str, tmp_path: Path) -> None:
    launched_pool_of(2)(resumed, stage, level, str(tmp_path))


def loaded_halfway(folder: str) -> None:
    """What one micro-batch of two has brought is of another run."""
    engine, flora = start(config_of(2, gradient_accumulation_steps=2, **COMPRESSED))
    engine.save_checkpoint(folder)
    train(engine, range(1))
    accumulators = [flow.accumulator for flow in flora.gradients.flows.values()]
    assert all(accumulator.sums_ENKR is not None for accumulator in accumulators)
    engine.load_checkpoint(folder)
    assert all(accumulator.sums_ENKR is None for accumulator in accumulators)


def test_loading_drops_the_sketches_that_have_come_in(tmp_path: Path) -> None:
    launched_pool_of(2)(loaded_halfway, str(tmp_path))


def of_dense_gradients(folder: str) -> None:
    engine, _ = start(config_of(2))
    train(engine, range(2))
    engine.save_checkpoint(folder)
    other, _ = start(config_of(2, **COMPRESSED))
    with pytest.raises(ValueError, match="must have gradients='compressed'; it has 'dense'"):
        other.load_checkpoint(folder)


def test_state_of_dense_gradients_is_refused(tmp_path: Path) -> None:
    launched_pool_of(2)(of_dense_gradients, str(tmp_path))


# ---- reports


class Leaf(nn.Module):
    """Its parameters' gradients come together, at stage 3."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(37, 37)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.inner(x_NI).tanh()


class WithLeaf(nn.Module):
    """A layer before a leaf and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 37)
        self.leaf = Leaf()
        self.down = nn.Linear(37, OUTPUTS)

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.down(self.leaf(self.up(x_NI))).square().mean()


def with_leaf() -> tuple[dict[str, str], float]:
    model = WithLeaf()
    set_z3_leaf_modules(model, [Leaf])
    engine, _ = start(config_of(3, **COMPRESSED), model=model)
    train(engine, range(3))
    report = flora_dist.deepspeed.gradient_report(engine)
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return {row.name: row.how for row in report.rows}, norm


def test_leaf_modules_stay_dense_and_the_report_says_so() -> None:
    hows, norm = launched_pool_of(2)(with_leaf)[0]
    assert hows["up.weight"] == "compressed, 2 per block of 8"
    assert hows["leaf.inner.weight"].startswith("dense: in a leaf module of ZeRO-3")
    assert hows["up.bias"] == "dense: 1-D"
    assert norm > 0


def report_of(level: str) -> tuple[int, int, str]:
    engine, flora = start(config_of(2, flora={"gradients": level}))
    report = flora_dist.deepspeed.gradient_report(engine)
    assert flora_dist.deepspeed.attach(engine) is flora  # again: nothing
    assert str(flora_dist.deepspeed.gradient_report(engine)) == str(report)
    assert flora.report().level == level
    engine.destroy()
    return report.held_bytes, report.sent_bytes, report.rows[0].how


def test_the_report_counts_what_is_held_and_sent() -> None:
    # up: 37 rows of 3 blocks, down: 10 of 5; 2 numbers of 4 bytes. Sent to two ranks: the block
    # that they cut in the middle goes to both.
    for held, sent, how in launched_pool_of(2)(report_of, "fused"):
        assert held == (37 * 3 + 10 * 5) * 2 * 4
        assert held <= sent <= held + 8
        assert how == "fused, 2 per block of 8"


def dense_report() -> None:
    engine, _ = start(config_of(2))
    with pytest.raises(ValueError, match="this one's are dense"):
        flora_dist.deepspeed.gradient_report(engine)
    engine.destroy()


def test_an_engine_of_dense_gradients_has_no_report_of_them() -> None:
    launched_pool_of(2)(dense_report)

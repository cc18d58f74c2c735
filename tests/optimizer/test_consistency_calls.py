# SPDX-License-Identifier: Apache-2.0
"""Who compares, when and over which ranks; what the error says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import flora_dist
from flora_dist import Flora
from flora_dist.core.consistency import compare as consistency
from flora_dist.core.consistency.disagreement import Said, complaint
from flora_dist.core.consistency.fingerprints import MOST_ELEMENTS
from tests.battery import zoo
from tests.conftest import pool_of
from tests.optimizer import consistency_runs as held
from tests.optimizer import runs

Plant = Callable[[held.HeldRun], None]


# ---- names


def _with_parameters(change: str) -> str:
    parameters = runs.build()
    if dist.get_rank() == 1:
        if change == "renamed":
            parameters["other"] = parameters.pop("wide")
        elif change == "fewer":
            del parameters["wide"]
        elif change == "another shape":
            parameters["wide"] = nn.Parameter(torch.zeros(6, 20, dtype=torch.float64))
        elif change == "another order":
            parameters = dict(reversed(parameters.items()))
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    return held.refusal(held.HeldRun(optimizer, lambda _: None, dict))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("renamed", ["shape of 'other'", "'(5, 20)' on rank 1 and absent on rank 0"]),
        ("fewer", ["shape of 'wide'", "absent on rank 1 and '(5, 20)' on rank 0"]),
        ("another shape", ["shape of 'wide'", "'(6, 20)' on rank 1 and '(5, 20)' on rank 0"]),
    ],
)
def test_another_model_on_one_rank_is_found_before_the_first_step(
    change: str, words: list[str]
) -> None:
    for text in pool_of(2)(_with_parameters, change):
        for word in ["the same names; ", *words]:
            assert word in text, text


def test_the_order_of_named_parameters_does_not_matter() -> None:
    # It decides nothing: steps go by names.
    assert set(pool_of(2)(_with_parameters, "another order")) == {""}


def _unnamed(*, reverse: bool) -> str:
    parameters = list(runs.build().values())
    if reverse and dist.get_rank() == 1:
        parameters.reverse()
    optimizer = Flora(parameters, **runs.SETTINGS)
    return held.refusal(held.HeldRun(optimizer, lambda _: None, dict))


def test_the_order_of_parameters_without_names_does() -> None:
    assert set(pool_of(2)(_unnamed_in_order)) == {""}
    assert "shape of '#0' is '()' on rank 1" in pool_of(2)(_unnamed_reversed)[0]


def _unnamed_in_order() -> str:
    return _unnamed(reverse=False)


def _unnamed_reversed() -> str:
    return _unnamed(reverse=True)


# ---- groups of ranks


def _stages() -> tuple[str, str]:
    """Two stages of a pipeline, two ranks each."""
    stage = dist.get_rank() // 2
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    parameters = runs.build({f"{stage}.{name}": shape for name, shape in runs.SHAPES.items()})
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(2))
    run = held.HeldRun(optimizer, lambda _: None, dict)
    return held.refusal(run, pairs[stage]), held.refusal(run)


def test_a_group_says_whom_to_compare() -> None:
    for among_stage, among_all in pool_of(4)(_stages):
        assert among_stage == ""
        assert "check_consistency(group)" in among_all


def _over_a_mesh() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    run = held.rows_of_replicas()
    run.train(range(2))
    said = [held.refusal(run, mesh)]
    if dist.get_rank() == 3:
        run.optimizer.param_groups[0]["lr"] = 1.0
    axes = [mesh.get_group(axis) for axis in range(2)]
    return [*said, held.refusal(run, mesh), held.refusal(run, axes)]


def test_over_the_axes_of_a_mesh_everyone_hears_of_everyone() -> None:
    for equal, by_mesh, by_groups in pool_of(4)(_over_a_mesh):
        assert equal == ""
        assert "1.0 on rank 3 and 0.01 on ranks 0, 1, 2" in by_mesh
        assert by_groups == by_mesh


def test_in_one_process_there_is_nobody_to_compare_with() -> None:
    assert not dist.is_initialized()
    _, optimizer = runs.trained(2, check_every=1)
    optimizer.check_consistency()


# ---- size


def _sizes(count: int) -> list[tuple[str, int]]:
    parameters = runs.build({f"{index}": (8, 24) for index in range(count)})
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(1))
    sent = []
    original = dist.all_reduce

    def spy(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
        sent.append((str(tensor.dtype), tensor.numel() * tensor.element_size()))
        return original(tensor, *arguments, **more)

    dist.all_reduce = spy
    try:
        optimizer.check_consistency()
    finally:
        dist.all_reduce = original
    return sent


@pytest.mark.parametrize("count", [1, 300])
def test_it_is_one_message_of_the_same_size_whatever_the_model(count: int) -> None:
    for sent in pool_of(2)(_sizes, count):
        assert sent == [("torch.int64", 4176)]


def test_of_many_parameters_and_elements_all_are_read_in_time() -> None:
    shapes = {f"{index:03}": (2, 8) for index in range(300)}
    shapes["long"] = (3 * MOST_ELEMENTS + 5,)
    parameters = runs.build(shapes)
    optimizer = Flora(parameters.items(), **runs.SETTINGS)
    runs.train(optimizer, parameters, range(1))
    by_name = {slot.part.name: slot for slot in optimizer.slots()}
    seen, starts = set(), set()
    # Steps that a check every 100 steps comes to: their own divisors must not hide anything.
    for step in range(100, 12800, 100):
        for state in optimizer.state.values():
            state["step"] = step
        samples = [(n, s) for n, s in consistency._samples(by_name, optimizer.state) if s]
        seen |= {name for name, _ in samples}
        assert len({name for name, _ in samples}) == 128
        for name, sample in samples:
            assert max(tensor.numel() for tensor in sample.values()) <= MOST_ELEMENTS
            if name == "long":
                starts.add(sample["weight"].storage_offset())
    assert seen == set(shapes)
    assert starts == {0, MOST_ELEMENTS, 2 * MOST_ELEMENTS, 3 * MOST_ELEMENTS}


# ---- attaching


def _attached(change: str) -> tuple[str, bool]:
    rank = dist.get_rank()
    model = DistributedDataParallel(zoo.build(torch.float32))
    settings = {"rank": 2, "block": 8, "seed": rank if change == "seed" else 0}
    optimizer = Flora(model.named_parameters(), **settings)
    level = "fused" if change == "level" and rank == 1 else "compressed"
    more: dict[str, Any] = {"gradient_rank": 1 + rank} if change == "gradient_rank" else {}
    if change == "wire_dtype" and rank == 1:
        more["wire_dtype"] = "bfloat16"
    try:
        flora_dist.attach(model, optimizer, level, **more)
    except ValueError as error:
        return str(error), optimizer.gradients.level == optimizer.roster.level == "dense"
    return "", optimizer.gradients.level == "dense"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("level", "the same level; gradients is 'fused' on rank 1 and 'compressed' on rank 0"),
        ("gradient_rank", "the same level; gradient_rank is 2 on rank 1 and 1 on rank 0"),
        ("wire_dtype", "the same level; wire_dtype is 'bfloat16' on rank 1 and 'float32' on"),
        ("seed", "the same seed; seed of"),
    ],
)
def test_ranks_that_attach_otherwise_are_refused_and_nothing_is_attached(
    change: str, words: str
) -> None:
    for text, is_untouched in pool_of(2)(_attached, change):
        assert words in text
        assert is_untouched


def test_ranks_that_attach_alike_are_not() -> None:
    assert pool_of(2)(_attached, "") == [("", False)] * 2


# ---- words


def _said(rank: int, value: Any) -> Said:
    return Said(
        rank=rank, fields={"settings": {"w": {"lr": value}}}, statistics={}, groups={"w": 2}
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 2, 2], "1 on rank 0 and 2 on ranks 1, 2."),
        ([1, 2, 3], "2 on rank 1 and 3 on rank 2 and 1 on rank 0."),
        ([1, 1, 2, 2], "2 on ranks 2, 3 and 1 on ranks 0, 1."),
        ([0, *[1] * 20], "0 on rank 0 and 1 on ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more."),
    ],
)
def test_most_ranks_are_right_and_of_equally_many_the_first(values: list[int], words: str) -> None:
    text = complaint(_said(rank, value) for rank, value in reversed(list(enumerate(values))))
    assert f"lr of 'w' (group 2) is {words}" in text


def test_other_fields_that_differ_are_named_too() -> None:
    each = [
        Said(
            rank=rank,
            fields={"seed": {"w": {"seed": rank}}, "steps": {"w": {"step": rank}}},
            statistics={},
            groups={},
        )
        for rank in range(2)
    ]
    assert "seed of 'w' is 1 on rank 1 and 0 on rank 0 (steps differ too)." in complaint(each)

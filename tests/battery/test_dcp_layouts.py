# SPDX-License-Identifier: Apache-2.0
"""torch's own checkpoints, with no help of ours, from each layout to each other.

Saved after five of ten steps. The same layout goes on bit for bit, another one as the reference
does, to the tolerance of ``test_layouts.py``. Blocks that columns cut load on their own layout.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.battery import dcp_layouts as dcp
from tests.battery.dcp_layouts import ALIGNED, CASE, CUT, LAYOUTS, WAYS
from tests.battery.oracle import STEPS, distances, reference_run
from tests.battery.test_layouts import EXACT
from tests.battery.variants import Weights, differing
from tests.conftest import pool_of

UNCUT = [layout for layout in LAYOUTS if layout != CUT]
# All ways on the layouts where torch does most; elsewhere the one of everyday use.
SLICE = [
    *((ALIGNED, way) for way in WAYS if way != "full, from rank 0"),
    *(("hsdp 2x2", way) for way in ("asynchronous", "full, from rank 0")),
    ("ddp x2", "together"),
    (CUT, "nested"),
]
# Each layout once from and once to, in one way each.
PAIRS = [
    ("plain", "fsdp2 x3", "nested"),
    ("fsdp2 x3", "hsdp 2x2", "flattened"),
    ("hsdp 2x2", ALIGNED, "together"),
    (ALIGNED, "fsdp2 x2", "asynchronous"),
    ("fsdp2 x2", "fsdp2 x4", "full, from rank 0"),
    ("fsdp2 x4", "ddp x2", "nested"),
    ("ddp x2", "plain", "together"),
]


class _Saved:
    """What each layout has saved, once per session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, list[Any]] = {}

    def of(self, layout: str) -> tuple[list[Any], Path]:
        place = self._folder / layout.replace(" ", "-")
        if layout not in self._runs:
            place.mkdir()
            ways = [way for way in WAYS if torch_can(layout, way)]
            self._runs[layout] = pool_of(LAYOUTS[layout].ranks)(
                dcp.save_half_way, layout, ways, place
            )
        return self._runs[layout], place


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> _Saved:
    return _Saved(tmp_path_factory.mktemp("dcp"))


@cache
def _expected() -> tuple[Weights, Weights]:
    return reference_run(CASE)


def torch_can(layout: str, way: str) -> bool:
    """torch 2.13 cuts a full tensor otherwise than FSDP2 over tensor parallelism does."""
    return (layout, way) != (ALIGNED, "full, from rank 0")


def _check_same_layout(saved: _Saved, layout: str, way: str) -> None:
    runs, place = saved.of(layout)
    resumed = pool_of(LAYOUTS[layout].ranks)(dcp.go_on, layout, way, place)
    for ours, theirs in zip(resumed, runs, strict=True):
        for moment in range(2):
            assert differing(ours[moment], theirs[moment]) == []


def _check_other_layout(saved: _Saved, source: str, target: str, way: str) -> None:
    _, place = saved.of(source)
    for _, end in pool_of(LAYOUTS[target].ranks)(dcp.go_on, target, way, place):
        assert end["up.weight.step"] == STEPS
        weights = {name: end[name] for name in _expected()[0]}
        assert distances(*_expected(), weights)[1] < EXACT


@pytest.mark.parametrize(("layout", "way"), SLICE)
def test_the_same_layout_goes_on_bit_for_bit(saved: _Saved, layout: str, way: str) -> None:
    _check_same_layout(saved, layout, way)


@pytest.mark.parametrize(("source", "target", "way"), PAIRS)
def test_another_layout_goes_on_as_the_reference(
    saved: _Saved, source: str, target: str, way: str
) -> None:
    _check_other_layout(saved, source, target, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_on_bit_for_bit_in_every_way(
    saved: _Saved, layout: str, way: str
) -> None:
    if torch_can(layout, way):
        _check_same_layout(saved, layout, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", UNCUT)
@pytest.mark.parametrize("source", UNCUT)
def test_every_layout_goes_on_on_every_other_in_every_way(
    saved: _Saved, source: str, target: str, way: str
) -> None:
    if source != target and torch_can(source, way) and torch_can(target, way):
        _check_other_layout(saved, source, target, way)


@pytest.mark.parametrize(
    ("source", "target", "way"),
    [
        ("fsdp2 x2", "fsdp2 x3", "nested"),
        ("plain", "fsdp2 x2", "full, from rank 0"),
        ("hsdp 2x2", "plain", "flattened"),
    ],
)
def test_state_of_before_the_first_step_is_no_step(
    source: str, target: str, way: str, tmp_path: Path
) -> None:
    pool_of(LAYOUTS[source].ranks)(dcp.save_at_the_start, source, way, tmp_path)
    for end in pool_of(LAYOUTS[target].ranks)(dcp.go_on_from_the_start, target, way, tmp_path):
        assert end["up.weight.step"] == STEPS
        weights = {name: end[name] for name in _expected()[0]}
        assert distances(*_expected(), weights)[1] < EXACT


# ---- blocks that columns cut


@pytest.mark.parametrize(
    ("source", "target", "way", "words"),
    [
        # torch's own words: it looks at shapes before anybody else is asked
        (CUT, "fsdp2 x2", "nested", ["Size mismatch", "momentum"]),
        ("fsdp2 x2", CUT, "flattened", ["Size mismatch", "momentum"]),
        (CUT, "plain", "full, from rank 0", ["ValueError", "flora_dist.checkpoint.save and load"]),
    ],
)
def test_cut_blocks_do_not_load_on_another_layout_and_nothing_changes(
    saved: _Saved, source: str, target: str, way: str, words: list[str]
) -> None:
    _, place = saved.of(source)
    for text, changed in pool_of(LAYOUTS[target].ranks)(dcp.refused, target, way, place):
        for word in words:
            assert word in text, text
        # set_model_state_dict comes first in the full way, as users write it
        assert [name for name in changed if "." in name and name.split(".")[-1] in _STATE] == []


_STATE = {"momentum", "row", "column", "second", "step", "window"}


@pytest.mark.parametrize(("columns", "shape"), [(13, (9, 4, 2)), (16, (9, 2, 2))])
def test_a_momentum_of_the_same_shape_but_other_cuts_is_refused(
    columns: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    # 13 columns over 2 ranks: blocks 0 | 0, 1 in two places each; over 4: blocks 0 | 0 | 1 | 1. The
    # same shape to torch. 16 columns are cut between blocks by 2 and inside them by 4.
    assert set(pool_of(2)(dcp.save_narrow, columns, "nested", tmp_path)) == {shape}
    everyone = pool_of(4)(dcp.load_narrow, columns, "nested", tmp_path)
    assert len(set(everyone)) == 1
    text, here = everyone[0]
    assert here == (9, 4, 2)
    if columns == 13:
        assert "must have its blocks cut among 4 ranks by columns" in text
        assert "flora_dist.checkpoint.save and load" in text
    else:
        assert "Size mismatch" in text


def test_without_the_number_of_column_shards_it_would_load(tmp_path: Path) -> None:
    pool_of(2)(dcp.save_narrow, 13, "nested", tmp_path)
    assert {text for text, _ in pool_of(4)(dcp.load_narrow, 13, "nested", tmp_path, "unsaid")} == {
        ""
    }


def test_a_full_state_that_torch_would_stretch_over_places_is_refused(tmp_path: Path) -> None:
    # Four places for two ranks are one for each of four, where each has two: torch's copy_ would
    # repeat it.
    assert set(pool_of(2)(dcp.save_narrow, 20, "full, from rank 0", tmp_path)) == {(9, 4, 2)}
    for text, here in pool_of(4)(dcp.load_narrow, 20, "full, from rank 0", tmp_path):
        assert here == (9, 8, 2)
        assert "must have its blocks cut among 4 ranks by columns" in text

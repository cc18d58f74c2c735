# SPDX-License-Identifier: Apache-2.0
"""Which batches on a GPU take the kernels, and what the report says of the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn

from flora_dist import Flora
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.step.gradient import SketchedGradient
from flora_dist.core.step.plan import Plan
from flora_dist.kernels.gpu import choice
from flora_dist.kernels.terms import make_terms


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(choice.VARIABLE, "triton")
    choice.without_triton.cache_clear()
    yield
    choice.without_triton.cache_clear()


def slots(**settings: object) -> list[Trainable]:
    """Three parameters as an optimizer holds them; where they lie makes no difference here."""
    shapes = {"wide": (8, 128), "narrow": (8, 20), "bias": (8,)}
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    return Flora(named, **settings).slots()  # type: ignore[arg-type]


def test_the_report_names_triton_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = choice.said_on_gpu(slots())
    assert said.startswith("triton 3."), said
    assert ";" not in said
    for other in ("torch", ""):
        monkeypatch.setenv(choice.VARIABLE, other)
        assert choice.said_on_gpu(slots()).startswith("torch; FLORA_DIST_GPU_KERNELS=triton asks")
    monkeypatch.setenv(choice.VARIABLE, "tritn")
    with pytest.raises(ValueError, match="must be torch, triton or unset; got 'tritn'"):
        choice.said_on_gpu(slots())


def test_blocks_that_the_kernels_have_no_product_for_are_left_to_torch() -> None:
    said = choice.said_on_gpu(slots(block=8, rank=2))
    assert said.endswith("; torch for rank 2 per block of 8 (2 parameters)"), said
    assert ";" not in choice.said_on_gpu(slots(block=8, rank=2, momentum="none"))


def test_settings_that_only_torchs_operators_step_are_named() -> None:
    covered: list[dict[str, object]] = [
        {"momentum": "ademamix"}, {"growth": 1.01}, {"normalise": "rows"}, {"normalise": "columns"},
        {"momentum": "flora_strict", "scale_parameter": True}, {"scale_parameter": "relative"},
        {"momentum": "subspace_adam"}, {"momentum": "apollo"},
    ]  # fmt: skip
    for settings in covered:
        assert ";" not in choice.said_on_gpu(slots(**settings)), settings
    assert "; torch for orthogonalise=4 (" in choice.said_on_gpu(slots(orthogonalise=4))


def test_what_kernels_add_to_messages_lies_where_the_parameters_do() -> None:
    buffer, terms = make_terms([("columns", (2, 3)), ("history", (2,))], torch.device("meta"))
    assert {each.device.type for each in (buffer, *terms.values())} == {"meta"}
    assert buffer.numel() == 8


def test_without_triton_the_report_says_so_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(choice, "version", missing)
    said = choice.said_on_gpu(slots())
    assert said == "torch: Triton is not installed. pip install 'flora-dist[gpu]'"


def test_a_triton_that_is_too_old_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "version", lambda _: "3.2.0")
    assert "must be at least 3.6; 3.2.0 is installed" in choice.without_triton()


def test_kernels_for_gpus_are_not_imported_where_no_cuda_tensor_is_stepped() -> None:
    # torch's own optimizers import Triton where it is installed; ours decorates nothing with it.
    code = (
        "import sys, torch\n"
        "from flora_dist import Flora\n"
        "weight = torch.nn.Parameter(torch.zeros(8, 64)); weight.grad = torch.ones(8, 64)\n"
        "Flora([('w', weight)]).step()\n"
        "assert 'flora_dist.kernels.gpu.access' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_captured_step_refuses_gradients_that_are_known_by_sketches() -> None:
    from flora_dist.kernels.gpu.graph import _check

    with pytest.raises(ValueError, match="other matrices at every step"):
        _check(Plan([], [SketchedGradient], lambda _: None))


def test_the_report_says_which_sketched_gradients_are_left_to_torch() -> None:
    own = slots(block=128, rank=16)
    assert ";" not in choice.said_on_gpu(own)
    for slot in own:
        slot.level = "compressed"
    assert "where over 64 of 128 numbers are kept" in choice.said_on_gpu(own)

# SPDX-License-Identifier: Apache-2.0
"""``Flora.paper`` against the authors' step spelt out in plain torch, on tall and wide matrices.

What their torch code does was read and run, not copied: Adafactor's factored second moment of the
exact gradient; momentum on the normalised gradient, read as (1 - b) u + b M A before M is touched;
at steps that kappa divides (counted from 1) M <- M A_old A_new^T, before the new gradient enters;
then clipping by RMS, then lr times max(1e-3, RMS(weight)). Their random numbers are not ours, so
both sides get our matrices.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_dist import Flora, attach, checkpoint
from flora_dist.core.parameters.transposed import as_stepped
from flora_dist.core.sketch.keys import Purpose, derive_key, name_key
from flora_dist.core.sketch.matrices import sketch_matrix
from flora_dist.core.state.presets import PAPER
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import geometry_of
from tests.optimizer import runs

KAPPA, STEPS, LR, BETA = 5, 12, 0.02, 0.9
Shape = tuple[int, int]


def _gaussian(window: int, rank: int, side: int) -> Tensor:
    key = derive_key(seed=0, name_key=name_key("w"), purpose=Purpose.MOMENTUM, window=window)
    return sketch_matrix(
        "gaussian", key=key, rank=rank, block=side, dtype=torch.float64, device="cpu"
    )


def _gradient(step: int, shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    scale = torch.linspace(0.1, 3.0, shape[1], dtype=torch.float64)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


class _Side:
    """Their projection: of the rows from the left where there are fewer, else of the columns."""

    def __init__(self, shape: Shape, rank: int) -> None:
        self.is_wide, self.rank, self.side = shape[0] < shape[1], rank, min(shape)
        self.is_dense = max(shape) > 4 * min(shape) or rank > min(shape)

    def down(self, x: Tensor, window: int) -> Tensor:
        if self.is_dense:
            return x
        sketch = _gaussian(window, self.rank, self.side)
        return sketch @ x if self.is_wide else x @ sketch.T

    def up(self, momentum: Tensor, window: int) -> Tensor:
        if self.is_dense:
            return momentum
        sketch = _gaussian(window, self.rank, self.side)
        return sketch.T @ momentum if self.is_wide else momentum @ sketch


def _authors(weight: Tensor, rank: int, transfer_at: int = KAPPA) -> Tensor:
    """Their ``flora_step`` on one matrix, line by line."""
    weight, side = weight.clone(), _Side((weight.shape[0], weight.shape[1]), rank)
    row, column = torch.zeros_like(weight[:, 0]), torch.zeros_like(weight[0])
    momentum = side.down(torch.zeros_like(weight), 0)
    window = 0
    for step in range(1, STEPS + 1):
        gradient = _gradient(step, (weight.shape[0], weight.shape[1]))
        decay = 1.0 - step**-0.8
        scale = max(1e-3, weight.square().mean().sqrt().item())
        squared = gradient.square() + 1e-30
        row = decay * row + (1 - decay) * squared.mean(dim=-1)
        column = decay * column + (1 - decay) * squared.mean(dim=-2)
        normalised = gradient * (row / row.mean()).rsqrt().unsqueeze(-1) * column.rsqrt()
        update = (1 - BETA) * normalised + BETA * side.up(momentum, window)
        if step % transfer_at == 0:
            momentum = side.down(side.up(momentum, window), window + 1)
            window += 1
        momentum = BETA * momentum + (1 - BETA) * side.down(normalised, window)
        update = update / max(1.0, update.square().mean().sqrt().item() / 1.0)
        weight = weight - LR * scale * update
    return weight


def _ours(weight: Tensor, rank: int, **settings: Any) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = Flora.paper([("w", parameter)], LR, rank=rank, kappa=KAPPA, clip=1.0, **settings)
    for step in range(1, STEPS + 1):
        parameter.grad = _gradient(step, (weight.shape[0], weight.shape[1]))
        optimizer.step()
    return parameter.detach()


@pytest.mark.filterwarnings("ignore:transfer='paper'")
def test_twelve_steps_with_two_window_changes_are_the_authors_own() -> None:
    start = _gradient(99, (12, 7))
    expected = _authors(start, 2)
    assert (_ours(start, 2) - expected).abs().max() < 1e-12
    # One step later for the transfers is another run, by far more than the bound.
    assert (_authors(start, 2, transfer_at=KAPPA + 1) - expected).abs().max() > 1e-6


@pytest.mark.filterwarnings("ignore:transfer='paper'")
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((7, 12), 2),
        ((12, 7), 7),
        ((7, 12), 7),
        ((7, 12), 8),
        ((3, 13), 2),
        ((13, 3), 2),
        ((3, 12), 1),
    ],
    ids=str,
)
def test_on_any_whole_matrix_the_authors_choice_of_side_and_shape_is_theirs(
    shape: Shape, rank: int
) -> None:
    start = _gradient(99, shape)
    expected = _authors(start, rank)
    assert (_ours(start, rank, compress="authors") - expected).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:transfer='paper'")
def test_a_wide_matrix_along_its_rows_is_another_run() -> None:
    start = _gradient(99, (7, 12))
    assert (_ours(start, 2) - _authors(start, 2)).abs().max() > 1e-4


def test_a_piece_of_a_wide_matrix_is_refused_and_a_tall_one_is_not() -> None:
    config = FloraConfig(**{**PAPER, "rank": 2, "compress": "authors"})
    part: Any = SimpleNamespace(name="w", shape=(7, 12))
    with pytest.raises(ValueError, match=r"'w' of shape \(7, 12\) has fewer rows.*'halving'"):
        as_stepped(part, geometry_of("w", (7, 12), config))
    tall: Any = SimpleNamespace(name="w", shape=(12, 7))
    assert as_stepped(tall, geometry_of("w", (12, 7), config)) is tall


def test_the_authors_choice_needs_whole_sides_and_gradients_that_are_not_sketched() -> None:
    named, model = [("w", nn.Parameter(torch.zeros(7, 12)))], nn.Linear(12, 7)
    with pytest.raises(ValueError, match="compress='authors' is of whole sides; got block=64"):
        Flora(named, compress="authors")
    with pytest.raises(ValueError, match="along rows alone; got compress='authors'"):
        attach(model, _paper_of(model), "compressed", gradient_rank=2)


def _paper_of(model: nn.Module) -> Flora:
    return Flora.paper(model.named_parameters(), rank=2, compress="authors")


@pytest.mark.filterwarnings("ignore:transfer='paper'")
def test_a_checkpoint_holds_a_wide_weight_as_it_is_and_its_state_as_it_was(tmp_path: Path) -> None:
    models = [nn.Linear(12, 7).double() for _ in range(2)]
    first, second = map(_paper_of, models)

    def step(model: nn.Module, optimizer: Flora, number: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad = runs.draw(name, number, parameter.shape, parameter.dtype)
        optimizer.step()

    step(models[0], first, 0)
    checkpoint.save(tmp_path, models[0], first, step=1)
    checkpoint.load(tmp_path, models[1], second)
    assert first.state[models[0].weight]["momentum"].shape == (12, 1, 2)
    assert first.report().rows[0].shape == (7, 12)
    for model, optimizer in zip(models, (first, second), strict=True):
        step(model, optimizer, 1)
    runs.assert_equal(models[1].state_dict(), models[0].state_dict())


def test_a_wide_matrix_is_kept_in_as_many_numbers_as_theirs_and_as_well() -> None:
    """Theirs combines its rows, A W; ours cuts each row in blocks as long as there are rows."""
    rows, columns, rank, draws = 8, 24, 2, 400
    size = geometry_of("w", (rows, columns), FloraConfig(**{**PAPER, "rank": rank}))
    assert size.num_rows * size.blocks_per_row * rank == rank * columns
    torch.manual_seed(0)
    wide = torch.randn(rows, columns, dtype=torch.float64)
    errors: dict[str, list[float]] = {"theirs": [], "ours": []}
    for draw in range(draws):
        sketch = sketch_matrix(
            "gaussian", key=draw, rank=rank, block=rows, dtype=torch.float64, device="cpu"
        )
        blocks = wide.view(rows, -1, rows)
        for name, got in (
            ("theirs", sketch.T @ (sketch @ wide)),
            ("ours", ((blocks @ sketch.T) @ sketch).view_as(wide)),
        ):
            errors[name].append(float((got - wide).square().sum() / wide.square().sum()))
    for found in errors.values():
        mean, spread = statistics.fmean(found), statistics.stdev(found) / draws**0.5
        assert abs(mean - (rows + 1) / rank) < 4 * spread < 1.0

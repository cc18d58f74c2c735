# SPDX-License-Identifier: Apache-2.0
"""The momentum rules, one formula each. X is the normalised gradient, M the momentum, b = beta1.

Sources: Flora (arXiv 2402.03293) Algorithm 2 and its authors' torch code; ``blend`` is ours,
``ademamix`` Simplified AdEMAMix (arXiv 2502.02431) in a sketch, ``subspace_adam`` near Alice-0
(arXiv 2502.07752), ``apollo`` APOLLO (arXiv 2412.05270).

Shape suffixes: E matrices, N rows, W columns of the piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flora_dist.core.sketch.ops import Blocks
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import Geometry
from flora_dist.core.step.basis import Basis, Place
from flora_dist.core.step.batch import Moment
from flora_dist.core.step.rates import corrected

SKETCH_EPS = 1e-8
"""Of second moments of sketched numbers, least: numbers that are zero but for float32's rounding,
about 1e-7 of a normalised gradient's, must not be made full steps of."""
LEAST_OF_USUAL = 0.1
"""Of a sketch's root mean square so far, that it counts for at least where it is divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Squares:
    """Sums over a whole matrix, (E,) each, from which RMS(U) follows."""

    x2: Tensor
    """|X|^2."""
    cross: Tensor
    """<X, M A_old>; 0 where the rule does not ask for history."""
    history: Tensor
    """|M A_old|^2; 0 likewise."""


class Rule(Protocol):
    """How a normalised gradient and a momentum make an update."""

    clips_input: ClassVar[bool]
    """X is clipped before the rule; otherwise U after it."""
    asks_history: ClassVar[bool]
    """RMS(U) needs the sums that hold M A_old."""
    asks_update: ClassVar[bool]
    """RMS(U) does not follow from sums known before the normalisation: a message of its own."""

    def advance(
        self, x: Blocks, compressed: Tensor, momentum: Tensor, now: Moment, place: Place
    ) -> tuple[Tensor, Tensor]:
        """U and the new M, from X, its sketch in the new window, and the stored M.

        U may take the memory of X, or be M.
        """

    def square_sum(self, squares: Squares) -> Tensor:
        """Squared norm (E,) of what is clipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloraRule:
    """The authors' torch code: read in the old window, then move, then add."""

    beta: float
    clips_input: ClassVar[bool] = False
    asks_history: ClassVar[bool] = True
    asks_update: ClassVar[bool] = False

    def advance(
        self, x: Blocks, compressed: Tensor, momentum: Tensor, now: Moment, place: Place
    ) -> tuple[Tensor, Tensor]:
        # M <- b move(M) + (1-b) X A_new^T
        new = advanced(momentum, compressed, now.basis, place, beta=self.beta)
        # U = (1-b) X + b M A_old
        now.basis.mix_(x, momentum, place, beta=self.beta)
        return x.elements_ENW, new

    def square_sum(self, squares: Squares) -> Tensor:
        # |(1-b) X + b M A|^2, term by term
        b = self.beta
        cross = 2 * b * (1 - b) * squares.cross
        return (1 - b) ** 2 * squares.x2 + cross + b**2 * squares.history


@dataclass(frozen=True, slots=True, kw_only=True)
class FloraStrictRule:
    """Algorithm 2: move, add, read in the new window."""

    beta: float
    clips_input: ClassVar[bool] = False
    asks_history: ClassVar[bool] = False
    asks_update: ClassVar[bool] = True

    def advance(
        self, x: Blocks, compressed: Tensor, momentum: Tensor, now: Moment, place: Place
    ) -> tuple[Tensor, Tensor]:
        del x
        # M <- b move(M) + (1-b) X A_new^T;  U = M A_new
        new = advanced(momentum, compressed, now.basis, place, beta=self.beta)
        return now.basis.expand(new, place), new

    def square_sum(self, squares: Squares) -> Tensor:
        raise AssertionError(f"RMS(U) comes with the third message; asked from {squares}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendRule:
    """Momentum inside the sketched subspace, the gradient itself outside.

    Needs A A^T = (block/rank) I. ``gain`` 1 is the projection, known as subspace momentum (Chen et
    al., SNSM, ICML 2025); block/rank the unbiased estimate of full momentum with the gradient as
    control variate. A dense momentum is exact: its gain is 1.

    What a gain g does. Inside the subspace U = (1 - g) X + g M. For X = h W, q = lr h and b = beta
    the steps follow z^2 - (1 + b - q (1 - g b)) z + b (1 + q (g - 1)) = 0, whose roots lie in the
    unit circle for q < (1 - b) / (b (g - 1)) where g > 1: at g = 2, b = 0.9 for q < 0.11, against
    2 of the plain gradient. Up to 1 there is no such limit. A direction that no subspace holds, as
    those of a few steep ones are, sees (1 - w) X + w M with w = gain rank / block on average: this
    w decides what momentum gains, and a larger rank buys it without the limit.
    """

    beta: float
    gain: float
    clips_input: ClassVar[bool] = True
    asks_history: ClassVar[bool] = False
    asks_update: ClassVar[bool] = False

    def advance(
        self, x: Blocks, compressed: Tensor, momentum: Tensor, now: Moment, place: Place
    ) -> tuple[Tensor, Tensor]:
        # M <- b move(M) + (1-b) c
        new = advanced(momentum, compressed, now.basis, place, beta=self.beta)
        # U = X + gain (rank/block) (M - c) A_new
        return now.basis.correct_(x, new, compressed, place, gain=self.gain), new

    def square_sum(self, squares: Squares) -> Tensor:
        return squares.x2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdEMAMixRule:
    """The gradient and a slow average of it, added.

    Source: Simplified AdEMAMix (Morwani et al., arXiv 2502.02431): m <- b m + g and U = m + a g.
    In our M = (1-b) m that is a times X + gain M with gain = 1 / (a (1-b)), so that their lr is
    ours over a. They average gradients and normalise the sum; here, as in every rule, the
    normalised gradient is averaged, and its sketch in place of it.

    Both terms push the same way: where ``blend`` with a gain above 1 has a limit on lr that falls
    with the gain alone, this one keeps q < 2 (1+b) / (1 + b + gain (1-b)), the limit of a gradient
    (2 at gain 0), which a slow average lowers little: 1.9 at b = 0.99 and gain 10.
    """

    beta: float
    gain: float
    clips_input: ClassVar[bool] = True
    asks_history: ClassVar[bool] = False
    asks_update: ClassVar[bool] = False

    def advance(
        self, x: Blocks, compressed: Tensor, momentum: Tensor, now: Moment, place: Place
    ) -> tuple[Tensor, Tensor]:
        # M <- b move(M) + (1-b) c
        new = advanced(momentum, compressed, now.basis, place, beta=self.beta)
        # U = X + gain (rank/block) M A_new
        return now.basis.add_(x, new, place, gain=self.gain), new

    def square_sum(self, squares: Squares) -> Tensor:
        return squares.x2


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceAdamRule:
    """Adam inside the sketched subspace, the gradient itself outside.

    Source: Alice-0 (Gong et al., arXiv 2502.07752, Algorithm 4 with a basis that is not tracked),
    and subspace momentum (Chen et al., SNSM, ICML 2025). With c in an orthonormal basis
    Q = sqrt(rank/block) A they step by Q^T Adam(Q x) and add what Q leaves of the gradient, divided
    by the column statistics of that rest and weighed by 0.2 to 0.4. Their Q holds leading
    directions. A seeded one leaves each row and column the same part of its squares on average:
    the factored second moment in X is the rest's own but for one number. ``gain`` is the weight of
    Adam's part beside the rest, 1 over theirs, with an lr of theirs times ours.
    """

    beta: float
    gain: float
    ratio: float
    """Block / rank."""
    eps: float
    clips_input: ClassVar[bool] = True
    asks_history: ClassVar[bool] = False
    asks_update: ClassVar[bool] = False

    def advance(
        self, x: Blocks, compressed: Tensor, momentum: Tensor, now: Moment, place: Place
    ) -> tuple[Tensor, Tensor]:
        whitened, new = _adam(momentum, compressed, now, place, beta=self.beta, eps=self.eps)
        # U = X + (gain sqrt(rank/block) M / sqrt(V) - (rank/block) c) A
        weighed = self.gain * self.ratio**0.5 * whitened - compressed
        return now.basis.add_(x, weighed, place, gain=1.0), new

    def square_sum(self, squares: Squares) -> Tensor:
        return squares.x2


@dataclass(frozen=True, slots=True, kw_only=True)
class ApolloRule:
    """The gradient itself, each block times the size of Adam's step over that of its sketch.

    Source: APOLLO (Zhu et al., arXiv 2412.05270): with C = G A^T and Adam's S = M / sqrt(V) of it,
    channel j is scaled by |S_j| / |C_j|. Their channels are the rows or columns along the longer
    side, projected whole; ours are blocks of a row, which nothing but cut blocks must be summed
    for: ``block="full"`` makes them rows where these are not fewer than columns. The factor
    sqrt(block/rank) by which a sketch makes the scale too small (their section 4) is made good
    here, so that lr is Adam's. A block has few numbers, all of which may miss a gradient that is
    not small; hence ``LEAST_OF_USUAL``, which a whole row's never come near.
    """

    beta: float
    ratio: float
    """Block / rank."""
    eps: float
    clips_input: ClassVar[bool] = False
    asks_history: ClassVar[bool] = False
    asks_update: ClassVar[bool] = True

    def advance(
        self, x: Blocks, compressed: Tensor, momentum: Tensor, now: Moment, place: Place
    ) -> tuple[Tensor, Tensor]:
        whitened, new = _adam(momentum, compressed, now, place, beta=self.beta, eps=self.eps)
        # U = sqrt(block/rank) |M / sqrt(V)| / max(|c|, |sqrt(V)| / 10) G, block by block
        usual_ENK = new.chunk(2, dim=-1)[1].sum(-1).sqrt()
        size_ENK = compressed.norm(dim=-1).maximum(LEAST_OF_USUAL * usual_ENK)
        scale_ENK = self.ratio**0.5 * whitened.norm(dim=-1) / size_ENK
        x.whole_ENM.view(*scale_ENK.shape, -1).mul_(scale_ENK.unsqueeze(-1))
        return x.elements_ENW, new

    def square_sum(self, squares: Squares) -> Tensor:
        raise AssertionError(f"RMS(U) comes with the third message; asked from {squares}")


def _adam(
    momentum: Tensor, compressed: Tensor, now: Moment, place: Place, *, beta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """M / sqrt(V) of sketched numbers, and both, as they are kept: one behind the other."""
    old, second = momentum.chunk(2, dim=-1)
    # M <- b move(M) + (1-b) c, b corrected for its start as Adam does
    new = advanced(old, compressed, now.basis, place, beta=corrected(beta, now.step))
    # V <- b2 V + (1-b2) (c^2 + eps)
    squares = compressed.square() + eps
    second = now.beta2 * now.basis.spread(second) + (1 - now.beta2) * squares
    return new * second.rsqrt(), torch.cat([new, second], dim=-1)


def advanced(
    momentum: Tensor, compressed: Tensor, basis: Basis, place: Place, *, beta: float
) -> Tensor:
    """M <- b move(M) + (1-b) c."""
    return (1 - beta) * compressed + beta * basis.move(momentum, place)


def _none(config: FloraConfig, geometry: Geometry) -> None:
    """No momentum: U = X, and X is what is clipped."""
    del config, geometry


def _blend(config: FloraConfig, geometry: Geometry) -> Rule:
    rank = geometry.rank
    gain = 1.0 if rank is None else config.gain_at(geometry.block / rank)
    return BlendRule(beta=config.beta1, gain=gain)


def _ademamix(config: FloraConfig, geometry: Geometry) -> Rule:
    ratio = 1.0 if geometry.rank is None else geometry.block / geometry.rank
    return AdEMAMixRule(beta=config.beta1, gain=config.gain_at(ratio))


def _subspace_adam(config: FloraConfig, geometry: Geometry) -> Rule:
    if geometry.rank is None:
        return BlendRule(beta=config.beta1, gain=1.0)
    ratio = geometry.block / geometry.rank
    gain = config.gain_at(ratio)
    eps = max(config.eps, SKETCH_EPS)
    return SubspaceAdamRule(beta=config.beta1, gain=gain, ratio=ratio, eps=eps)


def _apollo(config: FloraConfig, geometry: Geometry) -> Rule:
    # What it does not sketch it leaves to Adam: here to a factored second moment.
    if geometry.rank is None:
        return FloraRule(beta=config.beta1)
    return ApolloRule(beta=config.beta1, ratio=geometry.block / geometry.rank, eps=config.eps)


def _vectors(config: FloraConfig, geometry: Geometry) -> Rule | None:
    return BlendRule(beta=config.beta1, gain=1.0) if geometry.is_vector else None


def _flora(config: FloraConfig, geometry: Geometry) -> Rule:
    del geometry
    return FloraRule(beta=config.beta1)


def _flora_strict(config: FloraConfig, geometry: Geometry) -> Rule:
    # Dense momentum changes no basis: there it is ``flora``, and needs one message.
    made = FloraRule if geometry.rank is None else FloraStrictRule
    return made(beta=config.beta1)


RULES: dict[str, Callable[[FloraConfig, Geometry], Rule | None]] = {
    "flora": _flora,
    "flora_strict": _flora_strict,
    "blend": _blend,
    "ademamix": _ademamix,
    "subspace_adam": _subspace_adam,
    "apollo": _apollo,
    "vectors": _vectors,
    "none": _none,
}
"""By the names of ``settings.MOMENTA``; None: no momentum."""


def rule_of(config: FloraConfig, geometry: Geometry) -> Rule | None:
    """The rule of a group's parameters; None: no momentum, U = X with X clipped."""
    return RULES[config.momentum](config, geometry)

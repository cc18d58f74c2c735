# SPDX-License-Identifier: Apache-2.0
"""Flora on one device in its plainest writing: the oracle that every layout is tested against.

Whole matrices, statistics taken directly, one formula above one line, loops over parameters and
matrices; nothing here is fast. It takes the sketches and the rounding bits as callables and imports
nothing else of this package, so it shares no mistake with what it judges.

Letters of the formulas: W weight, G gradient, X normalised gradient, U update, M momentum, A sketch
matrix, b = beta1, b2 = rate of the second moment, t = real steps of the parameter, counted from 1.
Shapes: E matrices of a parameter (experts; 1 otherwise), N rows, M columns, K blocks per row,
B block, R rank of the sketch. Source: Hao, Cao, Mou, "Flora", ICML 2024, arXiv 2402.03293,
Algorithm 2, over Adafactor (arXiv 1804.04235). Ours and not theirs: blocks, ``blend``, ``shrink``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

_CLIP_FIRST = ("blend", "ademamix", "subspace_adam", "vectors", "none")  # clip X, not U
# Polar Express (arXiv 2505.16932) for singular values from 0.003 to 1 in three steps
_POLYNOMIALS = (8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695), (3.5056, -2.6267, 0.5257)
_TWO_MOMENTS = ("subspace_adam", "apollo")  # rules that keep V behind M where they sketch
_CHOICES = {
    "momentum": (*_CLIP_FIRST, "flora", "flora_strict", "apollo"),
    "normalise": ("factored", "rows", "columns", "racs"),
    "sketch": ("hadamard", "gaussian", "rademacher"),
    "transfer": ("shrink", "paper", "reset"),
}


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """The knobs of ``Flora`` that change the arithmetic, under the same names.

    ``sketch`` names the law of A only to choose the factor of ``transfer="shrink"``;
    ``state_dtype=None`` keeps the momentum in the dtype of the arithmetic, ``state_bits`` what few
    bits hold of a sketched one, as numbers of that dtype.
    """

    lr: float = 1e-3
    momentum: str = "blend"
    sketch: str = "hadamard"
    blend_gain: float | None = 1.0
    beta1: float = 0.9
    kappa: int = 1000
    transfer: str = "shrink"
    beta2: float | None = None
    eps: float = 1e-30
    normalise: str = "factored"
    clip: float | None = 1.0
    growth: float | None = None
    orthogonalise: int | None = None
    weight_decay: float = 0.0
    scale_parameter: bool | str = False
    state_dtype: torch.dtype | None = None
    state_bits: int | None = None
    stochastic_rounding: bool = True
    maximize: bool = False

    def __post_init__(self) -> None:
        """Refuse a misspelt choice: it would silently be another algorithm."""
        for field, allowed in _CHOICES.items():
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, is {value!r}. Choose one.")


def compress(x: Tensor, sketch: Tensor) -> Tensor:
    """Return c = x A^T by zero-padded blocks: x (..., M), A (R, B), c (..., K, R)."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % sketch.shape[1]))
    return padded.reshape(*x.shape[:-1], -1, sketch.shape[1]) @ sketch.T


def expand(compressed: Tensor, sketch: Tensor, columns: int) -> Tensor:
    """Return c A cut to the columns: c (N, K, R), A (R, B), result (N, M)."""
    return (compressed @ sketch).flatten(1)[:, :columns]


def rms(x: Tensor) -> Tensor:
    """Return sqrt(mean(x^2)), a scalar."""
    return x.square().mean().sqrt()


def clipped(x: Tensor, clip: float | None) -> Tensor:
    """Return x / max(1, RMS(x) / clip); None does not clip."""
    return x if clip is None else x / (rms(x) / clip).clamp(min=1.0)


def _bounded_by(last: Tensor, like: Tensor, s: ReferenceSettings) -> ReferenceSettings:
    """Return the settings with growth written as the clip of this step: RMS <= growth RMS_last."""
    # A norm below 1e-4 is rounding's: from it no update could ever grow again.
    clip = float(s.growth * last / like.numel() ** 0.5) if s.growth and last > 1e-4 else None
    return replace(s, clip=clip)


def stochastic_round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round to a neighbour in bf16 or fp16 by ``bits`` u in [0, 65536); NaN and inf stay."""
    size, info = x.double().abs(), torch.finfo(dtype)
    power = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    # q = the spacing of dtype at |x|, constant below the smallest normal number
    spacing = info.eps * power.clamp(min=info.smallest_normal)
    # y = sign(x) floor(|x| / q + u / 65536) q
    rounded = x.double().sign() * (size / spacing + bits.double() / 65536).floor() * spacing
    # frexp leaves the exponent of inf and NaN unspecified.
    return torch.where(x.isfinite(), rounded, x.double()).to(dtype)


def few_bits(x: Tensor, number_bits: int, bits: Tensor) -> Tensor:
    """Round each row of x (..., R) to 2^number_bits even steps by ``bits`` u in [0, 65536)."""
    largest, top = x.abs().amax(-1, keepdim=True), (1 << number_bits) - 1
    # s = the smallest bf16 that is not below |x|
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 8)
    scale = (largest / power).ceil() * power
    # y = s (2 k / L - 1), k = floor((x / s + 1) L / 2 + (u + 1/2) / 65536)
    place = (x / scale.clamp(min=torch.finfo(x.dtype).tiny) + 1) * (top / 2)
    k = (place + (bits.to(x.dtype) + 0.5) / 65536).floor().clamp(0, top)
    return scale * (2 * k / top - 1)


def alike(tile: Tensor) -> Tensor:
    """Return a tile with singular values about alike, at its own size: Newton-Schulz steps."""
    if not tile.any():
        return tile
    y = tile / (tile @ tile.T).square().sum().sqrt().sqrt()
    for a, b, c in _POLYNOMIALS:
        s = y @ y.T
        y = a * y + b * s @ y + c * s @ s @ y
    return y * (rms(tile) / rms(y))


def _rate(t: int, beta2: float | None) -> float:
    """Return b2 at step t, 1 - t^-0.8 unless beta2 is given; it is 0 at t = 1."""
    if beta2 is None:
        return float(1 - t**-0.8)
    # b2 <- beta2 (1 - beta2^(t-1)) / (1 - beta2^t): Adam's bias correction as a moving rate
    return float(beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t))


def _normalise_(g: Tensor, state: Mapping[str, Tensor], b2: float, s: ReferenceSettings) -> Tensor:
    """Move the statistics of one matrix or vector in place and return X."""
    if "second" in state:
        # V <- b2 V + (1-b2) (G^2 + max(eps, 1e-12));  X = G / sqrt(V)
        state["second"].mul_(b2).add_((1 - b2) * (g.square() + max(s.eps, 1e-12)))
        return g / state["second"].sqrt()
    square, row, column = g.square() + s.eps, state["row"], state["column"]
    b2 = 0.0 if s.normalise in ("rows", "columns") else b2  # SCALE: this gradient alone
    v, w = torch.ones_like(row), torch.ones_like(column)
    if s.normalise == "racs" and column.any():
        # what rows and columns weigh: the old R and C, no less than a hundredth of a mean
        v, w = ((x / column.mean()).clamp(min=1e-2) for x in (row, column))
        v, w = v / v.mean(), w / w.mean()
    # R <- b2 R + (1-b2) rowmean(G^2 + eps);  C <- b2 C + (1-b2) colmean(G^2 + eps)
    row.mul_(b2).add_((1 - b2) * (square * w).mean(1))
    column.mul_(b2).add_((1 - b2) * (square.mT * v).mean(1))
    if s.normalise in ("rows", "columns"):
        # X = G / sqrt(R), or G / sqrt(C)
        return g / (row[:, None] if s.normalise == "rows" else column).sqrt()
    # X = G / sqrt(R C / mean(C)), factor by factor: in fp32 R C underflows where G is all zero
    return g / row.sqrt()[:, None] * (w * column).mean().sqrt() / column.sqrt()


def _move(momentum: Tensor, old: Tensor, new: Tensor, s: ReferenceSettings) -> Tensor:
    """Carry M (N, K, R) from the basis of the old window to the new: s M (A_old A_new^T)."""
    if s.transfer == "reset":
        return torch.zeros_like(momentum)
    rank, block = old.shape
    noise = {"hadamard": 0, "gaussian": rank + 1, "rademacher": rank - 1}[s.sketch]
    factor = rank / (block + noise) if s.transfer == "shrink" else 1.0
    return factor * momentum @ (old @ new.T)


def _gain(ratio: float, s: ReferenceSettings) -> float:
    """Return the weight of the momentum at ratio B/R."""
    return max(1.0, min(2.0, ratio / 2)) if s.blend_gain is None else s.blend_gain


def _rule(
    x: Tensor, momentum: Tensor, bases: Sequence[Tensor | None], moved: bool, s: ReferenceSettings
) -> tuple[Tensor, Tensor]:
    """Return U and the new M; ``bases``: A of the old and of the new window, None where dense."""
    b, (old, new) = s.beta1, bases
    if s.momentum in _CLIP_FIRST:
        x = clipped(x, s.clip)
    if old is None or new is None:
        # M <- b M + (1-b) X;  U = M
        momentum = b * momentum + (1 - b) * x
        if s.momentum == "ademamix":
            # U = X + gain M
            return x + _gain(1.0, s) * momentum, momentum
        return (momentum if s.momentum in _CLIP_FIRST else clipped(momentum, s.clip)), momentum
    arrived = _move(momentum, old, new, s) if moved else momentum
    c, columns = compress(x, new), x.shape[1]
    if s.momentum == "flora":  # the authors' torch code: read in the old basis, then move, then add
        # U = (1-b) X + b M A_old;  M <- b move(M) + (1-b) X A_new^T
        update = (1 - b) * x + b * expand(momentum, old, columns)
        return clipped(update, s.clip), b * arrived + (1 - b) * c
    # flora_strict (Algorithm 2), blend and ademamix: M <- b move(M) + (1-b) X A_new^T
    momentum = b * arrived + (1 - b) * c
    if s.momentum == "flora_strict":
        # U = M A_new
        return clipped(expand(momentum, new, columns), s.clip), momentum
    ratio = new.shape[1] / new.shape[0]
    if s.momentum == "ademamix":
        # U = X + gain (R/B) M A_new
        return x + _gain(ratio, s) / ratio * expand(momentum, new, columns), momentum
    # U = X + gain (R/B) (M - X A_new^T) A_new
    return x + _gain(ratio, s) / ratio * expand(momentum - c, new, columns), momentum


def _two_moments(
    x: Tensor, mv: Tensor, bases: Any, moved: bool, s: ReferenceSettings, g: Tensor, t: int
) -> tuple[Tensor, Tensor]:
    """Return U and the new M and V (N, K, 2 R) of the rules that have Adam in the sketch."""
    b, b2, (old, new) = _rate(t, s.beta1), _rate(t, s.beta2), bases
    (m, v), ratio = mv.chunk(2, -1), new.shape[1] / new.shape[0]
    x = g if s.momentum == "apollo" else clipped(x, s.clip)
    c, eps = compress(x, new), s.eps if s.momentum == "apollo" else max(s.eps, 1e-8)
    m, v = (_move(m, old, new, s), v.mean(-1, keepdim=True)) if moved else (m, v)
    # M <- b move(M) + (1-b) X A^T;  V <- b2 V + (1-b2) ((X A^T)^2 + eps)
    m, v = b * m + (1 - b) * c, b2 * v + (1 - b2) * (c.square() + eps)
    if s.momentum == "subspace_adam":
        # U = X + (gain sqrt(R/B) M / sqrt(V) - (R/B) X A^T) A
        inside = _gain(ratio, s) / ratio**0.5 * m / v.sqrt() - c / ratio
        return x + expand(inside, new, x.shape[1]), torch.cat([m, v], -1)
    # apollo: U = sqrt(B/R) |M / sqrt(V)| / max(|G A^T|, |sqrt(V)| / 10) G, block by block
    scale = ratio**0.5 * (m / v.sqrt()).norm(dim=-1) / c.norm(dim=-1).maximum(v.sum(-1).sqrt() / 10)
    wide = scale.repeat_interleave(new.shape[1], 1)[:, : x.shape[1]]
    return clipped(wide * x, s.clip), torch.cat([m, v], -1)


def _is_batch(x: Tensor) -> bool:
    """Tell experts from the kernels of a 1-D convolution, whose last dim is short."""
    return x.ndim == 3 and x.shape[2] >= 8


def _batch(x: Tensor) -> Tensor:
    """View a parameter as a batch: (E, N, M) of matrices, (1, *shape) of a vector."""
    return x if _is_batch(x) else (x.flatten(1) if x.ndim > 2 else x).unsqueeze(0)


class Reference:
    """Flora on whole tensors.

    Args:
        weights: Start values by name; cloned. At most 1-D: a vector; 3-D: a batch of matrices, each
            with its own A, statistics, RMS and clip; 4-D and more: one matrix (shape[0], rest).
        sketch: ``sketch(name, matrix, window)`` is A (R, B) in the dtype of the arithmetic (the
            wider of float32 and the weight's), None where it is dense; not asked for vectors.
        settings: One for all, or by name.
        bits: ``bits(name, "weight" | "momentum", step, shape)``: integers in [0, 65536) of that
            shape; needed where bf16 or fp16 is written with ``stochastic_rounding``.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        sketch: Callable[[str, int, int], Tensor | None],
        settings: ReferenceSettings | Callable[[str], ReferenceSettings],
        bits: Callable[[str, str, int, tuple[int, ...]], Tensor] | None = None,
    ) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self._settings = {n: settings(n) if callable(settings) else settings for n in weights}
        self._sketch, self._bits = sketch, bits
        self._clock = {name: {"step": 0, "window": 0} for name in weights}
        self._state = {name: self._zeros(name) for name in weights}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Take one step; a parameter whose gradient is missing or None is skipped, its t stays."""
        for name, gradient in gradients.items():
            if gradient is not None:
                self._step_parameter(name, gradient)

    def state(self, name: str) -> dict[str, Tensor | int]:
        """Copy "step", "window"; "second" of a vector, "row" (N,) and "column" (M,) of others.

        "momentum" is (N, K, R), where dense like the matrix (shape[0], rest) or vector, absent for
        the rule none; "norm" and "start" are (1,), for growth and a relative lr. A 3-D parameter
        has E in front of each.
        """
        tensors = {key: self._own(name, x).clone() for key, x in self._state[name].items()}
        return {**tensors, **self._clock[name]}

    def _own(self, name: str, x: Tensor) -> Tensor:
        """View a batch without its first axis where the parameter has none."""
        return x if _is_batch(self.weights[name]) else x[0]

    def _copy(self, name: str, x: Tensor) -> Tensor:
        """Copy a weight or gradient as a batch into the dtype of the arithmetic."""
        wider = torch.promote_types(torch.float32, self.weights[name].dtype)
        return _batch(x).to(wider, copy=True)

    def _zeros(self, name: str) -> dict[str, Tensor]:
        zeros, s = torch.zeros_like(self._copy(name, self.weights[name])), self._settings[name]
        matrix = zeros.ndim == 3
        state = {"second": zeros.clone()}
        if matrix:
            state = {"row": zeros.sum(2), "column": zeros.sum(1)}
            if s.growth is not None:
                state["norm"] = zeros.sum((1, 2)).unsqueeze(1)
            if s.scale_parameter == "relative":
                state["start"] = zeros.sum((1, 2)).unsqueeze(1)
        if s.momentum != "none" and not (matrix and s.momentum == "vectors"):
            sketch = self._sketch(name, 0, 0) if matrix else None
            moments = 1 + (s.momentum in _TWO_MOMENTS)
            momentum = zeros if sketch is None else compress(zeros, sketch).repeat(1, 1, 1, moments)
            state["momentum"] = momentum.to(s.state_dtype or zeros.dtype)
        return state

    def _step_parameter(self, name: str, gradient: Tensor) -> None:
        s, state, clock = self._settings[name], self._state[name], self._clock[name]
        weights, gradients = (self._copy(name, x) for x in (self.weights[name], gradient))
        windows = clock["window"], (clock["step"] + 1) // s.kappa
        clock["step"], clock["window"] = clock["step"] + 1, windows[1]
        b2 = _rate(clock["step"], s.beta2)
        momenta = state["momentum"].to(weights.dtype, copy=True) if "momentum" in state else None
        for e, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            x = _normalise_(-g if s.maximize else g, {k: v[e] for k, v in state.items()}, b2, s)
            own = _bounded_by(state["norm"][e], x, s) if "norm" in state else s
            if momenta is None:
                update: Any = clipped(x, own.clip)
            else:
                bases = [self._sketch(name, e, i) if x.ndim == 2 else None for i in windows]
                rule = _rule
                if s.momentum in _TWO_MOMENTS and bases[0] is not None:
                    rule = partial(_two_moments, g=-g if s.maximize else g, t=clock["step"])
                update, momenta[e] = rule(x, momenta[e], bases, windows[0] != windows[1], own)
            if "norm" in state:
                # what is bounded: X before these rules, U after the others
                early = s.momentum in _CLIP_FIRST
                state["norm"][e] = (clipped(x, own.clip) if early else update).norm()
            if s.orthogonalise is not None and x.ndim == 2:
                rows = [r.mT.split(s.orthogonalise) for r in update.split(s.orthogonalise)]
                update = torch.cat([torch.cat([alike(t.mT) for t in row], 1) for row in rows])
            # W <- (1 - lr wd) W - lr scale U
            scale = rms(w).clamp(min=1e-3) if s.scale_parameter is True else 1.0
            if "start" in state:
                # RMS(W) / RMS(W at the first step), 2 at most; one that started below 1e-3 keeps lr
                size, start = rms(w).clamp(min=1e-3), state["start"][e]
                start.copy_(torch.where(start > 0, start, size))
                scale = torch.where(start > 1e-3, (size / start).clamp(0.5, 2.0), 1.0)
            w.copy_((1 - s.lr * s.weight_decay) * w - s.lr * scale * update)
        self._write_(name, "weight", self.weights[name], weights.reshape(gradient.shape))
        if momenta is not None:
            stored, new = self._own(name, state["momentum"]), self._own(name, momenta)
            if s.state_bits is not None and momenta.ndim == 4:
                # M <- Q(M): block by block
                stored.copy_(few_bits(new, s.state_bits, self._drawn(name, "momentum", new)))
            else:
                self._write_(name, "momentum", stored, new)

    def _write_(self, name: str, purpose: str, target: Tensor, x: Tensor) -> None:
        if target.dtype != x.dtype and self._settings[name].stochastic_rounding:
            x = stochastic_round(x, target.dtype, self._drawn(name, purpose, x))
        target.copy_(x)

    def _drawn(self, name: str, purpose: str, x: Tensor) -> Tensor:
        if self._bits is None:
            raise ValueError(f"bits must be given: {name!r} rounds its {purpose} by them.")
        return self._bits(name, purpose, self._clock[name]["step"], tuple(x.shape))

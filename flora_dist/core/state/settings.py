# SPDX-License-Identifier: Apache-2.0
"""The settings of one parameter group, checked once. Standard library only."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from flora_dist.core.records import FEW_BITS
from flora_dist.core.state.bounds import check_choice, check_range, check_whole, is_whole

SKETCHES = ("hadamard", "gaussian", "rademacher")
PROJECTED = ("blend", "ademamix", "subspace_adam")
"""Rules whose gain is the weight of a projection, which A A^T = (block/rank) I makes of M A."""
MOMENTA = ("flora", "flora_strict", *PROJECTED, "apollo", "vectors", "none")
TWO_MOMENTS = ("subspace_adam", "apollo")
"""Rules that keep the second moment of each sketched number beside its momentum."""
READ_LAST = ("flora_strict", "apollo")
"""Rules whose update has a norm that follows from the update alone: a message of its own."""
COMPRESSIONS = ("halving", "authors")
OF_ONE_GRADIENT = ("rows", "columns")
"""Normalisations that average nothing over steps."""
NORMALISATIONS = ("factored", *OF_ONE_GRADIENT, "racs")
TRANSFERS = ("shrink", "paper", "reset")
STATE_DTYPES = ("float32", "bfloat16")
RELATIVE = "relative"
"""A value of ``scale_parameter``."""
STATE_BITS = (32, 16, 8, 4)
"""Of a momentum's numbers. With fewer, what each step's rounding adds outweighs what is kept."""
BETA1 = 0.9
SMALLEST_EPS = 1e-37
"""1 / R of a row without gradient must be finite in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloraConfig:
    """Everything that decides a group's arithmetic except ``lr`` and ``weight_decay``.

    Those two change at every step of a schedule and may be tensors, so they stay in the group.
    Rows named below are those of the quality bench (tests/bench/README.md) that set a default.
    """

    rank: int | None = 16
    """Numbers kept per block; None keeps the group dense. Row "blend, ratio 4,
    blend_gain 1": the loss of "blend, ratio 8", whose gain is 2, without its limit on lr; rank 8 at
    gain 1, "blend, blend_gain 1", is within the spread of the control."""
    block: int | str = 64
    """Consecutive row elements compressed together, a power of two; "full": the smaller of rows
    and columns, as in the paper. Rows "blend, block 16", "256" and "full" are within the seeds'
    spread of 64, which costs little arithmetic and divides most widths."""
    compress: str = "halving"
    """Which matrices, and along which side: halving (those that it halves, along their rows) or
    authors (2-D ones of an aspect ratio up to 4 and a rank up to the smaller side, along that)."""
    sketch: str = "hadamard"
    """Law of the projection: hadamard, gaussian (the paper) or rademacher."""
    momentum: str = "blend"
    """Rule: blend, ademamix, subspace_adam, apollo, flora (the authors' code), flora_strict
    (Algorithm 2), vectors (1-D parameters alone) or none. Rows "blend, ratio 8" and 4 beat none and
    the dense-only control by more than the spread; flora does not."""
    blend_gain: float | None = 1.0
    """blend, ademamix, subspace_adam: weight of the sketched momentum. Up to 1, the projection,
    blend converges like plain gradients; above 1 / beta1 the current gradient counts negatively in
    its subspace, and lr times curvature must stay below (1 - beta1) / (beta1 (gain - 1)). None, as
    in older runs: min(2, block / (2 rank))."""
    beta1: float = BETA1
    """Decay of the momentum per step. Rows "blend, beta1 0.8" and "0.95" are no better."""
    kappa: int = 1000
    """Steps between projections (paper, Algorithm 2). Row "blend, kappa 20" is worse by 0.03,
    "kappa 200" the same."""
    transfer: str = "shrink"
    """Momentum at a window change: shrink (least squares), paper (scale 1) or reset."""
    beta2: float | None = None
    """Decay of the second moment, bias-corrected; None: 1 - t^-0.8 (Adafactor)."""
    normalise: str = "factored"
    """What a matrix is divided by: the root of a factored second moment (Adafactor), or of the mean
    square of each of its rows or columns in this gradient alone, as in SCALE; or ("racs") of one
    whose means of rows weigh columns by theirs, and the other way round, as in RACS."""
    eps: float = 1e-30
    """Added to the squared gradient; 1-D parameters use at least 1e-12, and second moments of
    sketched numbers under "subspace_adam" 1e-8."""
    clip: float | None = 1.0
    """Largest root mean square of an update; None: no clipping. Rows "blend, clip None" and
    "clip 2" are within the spread; 1 is Adafactor's."""
    growth: float | None = None
    """Largest growth of a matrix's update from step to step, as a factor of its norm, in place of
    ``clip``; None: ``clip``. 1.01 in Fira (arXiv 2410.01623) and APOLLO (arXiv 2412.05270)."""
    orthogonalise: int | None = None
    """Side of the square tiles of a matrix's update whose singular values are made alike, each tile
    by itself and at its size, by Muon's Newton-Schulz iteration; None: as the rule made it."""
    scale_parameter: bool | str = False
    """True: multiply lr by max(1e-3, RMS(weight)), as Adafactor does. "relative": multiply the lr
    of a matrix by RMS(weight) over what that was at its first step, within 1/2 and 2, where this
    was above 1e-3."""
    state_dtype: str | None = None
    """Momentum's dtype: float32 (float64 for float64 parameters) or bfloat16. None: float32, but
    ``state_bits`` of sketches."""
    state_bits: int | None = None
    """Bits of each number of a sketched momentum: 32, 16, or 8 or 4 with a scale per block; dense
    momenta, which have no blocks to write records of, keep ``state_dtype``. None: as that says, or
    where it says nothing 8, but 32 for rules that keep two moments and without stochastic rounding.
    Row "default in 8 bits" is below tuned AdamW at all three sizes with 1/23 to 1/27 of its state.
    A sketch of as many numbers as its block has is a dense momentum in records, turned and not
    cut: for a head, rank 64 of block 64."""
    stochastic_rounding: bool = True
    """Round low-precision weights and momentum stochastically, from our own random bits."""
    skip_nonfinite: bool = False
    """Skip a step whose gradients, or their squares (above 1.8e19 in float32), hold NaN or inf;
    costs one device-to-host copy per step."""
    strict: bool = False
    """Raise where a matrix expected to be compressed would be dense."""
    seed: int = 0
    """One per run, equal on all ranks."""

    def __post_init__(self) -> None:
        check_whole("rank", self.rank, smallest=1, none_means="keep the group dense")
        self._check_block()
        check_choice("sketch", self.sketch, SKETCHES)
        self._check_momentum()
        check_choice("transfer", self.transfer, TRANSFERS)
        check_choice("compress", self.compress, COMPRESSIONS)
        check_choice("normalise", self.normalise, NORMALISATIONS)
        self._check_state()
        check_whole(
            "orthogonalise", self.orthogonalise, smallest=2, none_means="leave updates alone"
        )
        check_whole("kappa", self.kappa, smallest=1)
        check_range("beta1", self.beta1, 0.0, 1.0)
        if self.blend_gain is not None:
            check_range("blend_gain", self.blend_gain, 0.0, math.inf)
        check_range("eps", self.eps, SMALLEST_EPS, math.inf)
        if self.beta2 is not None:
            check_range("beta2", self.beta2, 0.0, 1.0)
        if self.clip is not None:
            check_range("clip", self.clip, 0.0, math.inf)
            if self.clip == 0.0:
                raise ValueError("clip must be above 0; got 0. Pass None to switch clipping off.")
        if self.growth is not None:
            check_range("growth", self.growth, 1.0, math.inf)
        for name in ("stochastic_rounding", "skip_nonfinite", "strict"):
            check_bool(name, getattr(self, name))
        if self.scale_parameter != RELATIVE:
            _check_scaling(self.scale_parameter)
        if not is_whole(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(
                f"seed must be a whole number of 64 bits; got {self.seed!r}. Pass an int."
            )
        self._check_pairs()

    @property
    def bounds_matrices(self) -> bool:
        """Whether updates of matrices are bounded, so that their norms must be known."""
        return self.clip is not None or self.growth is not None

    @property
    def scales_vectors(self) -> bool:
        """Whether the lr of 1-D parameters depends on their size."""
        return self.scale_parameter is True

    @property
    def scales_matrices(self) -> bool:
        """Whether the lr of matrices depends on their size."""
        return self.scale_parameter is not False

    def gain_at(self, ratio: float) -> float:
        """Weight of the sketched momentum where a block is ``ratio`` times its rank.

        The default: 2 at ratio 4 and above; 1 at ratio 2, where 2 is the whole of the momentum, and
        below, where 1 is.
        """
        return max(1.0, min(2.0, ratio / 2)) if self.blend_gain is None else self.blend_gain

    @property
    def sketch_bits(self) -> int:
        """Bits of each number of a sketched momentum; 32 stands for the arithmetic's dtype."""
        if self.state_bits is not None:
            return self.state_bits
        if self.state_dtype is not None:
            return 16 if self.state_dtype == "bfloat16" else 32
        keeps_one = self.momentum not in (*TWO_MOMENTS, "vectors", "none")
        return 8 if keeps_one and self.stochastic_rounding else 32

    def _check_block(self) -> None:
        if self.block == "full":
            return
        if not is_whole(self.block) or int(self.block) < 1 or int(self.block).bit_count() != 1:
            raise ValueError(
                f"block must be a power of two or 'full'; got {self.block!r}. "
                "Pass 16, 32, 64, 128 or 256."
            )

    def _check_state(self) -> None:
        if self.state_dtype is not None:
            check_choice("state_dtype", self.state_dtype, STATE_DTYPES)
        if self.state_bits is not None:
            check_bits("state_bits", self.state_bits, STATE_BITS)

    def _check_momentum(self) -> None:
        if self.momentum not in MOMENTA and not isinstance(self.momentum, str):
            raise ValueError(
                f"momentum names a rule, one of {', '.join(MOMENTA)}; got {self.momentum!r}. Its "
                "decay is beta1."
            )
        check_choice("momentum", self.momentum, MOMENTA)

    def _check_pairs(self) -> None:
        check_rank(self.rank, self.block, self.sketch_bits)
        if self.sketch_bits in FEW_BITS and self.momentum in TWO_MOMENTS:
            raise ValueError(
                f"momentum={self.momentum!r} keeps second moments beside the momentum, which share "
                f"no scale with it; got state_bits={self.state_bits}. Pass state_bits=16 or 32."
            )
        if self.sketch_bits == 16 and self.momentum in TWO_MOMENTS and not self.stochastic_rounding:
            raise ValueError(
                f"momentum={self.momentum!r} with a state in bfloat16 needs "
                "stochastic_rounding=True: rounded to nearest, second moments would stop moving. "
                "Leave it on, or pass state_bits=32."
            )
        if self.momentum in TWO_MOMENTS and self.normalise != "factored":
            raise ValueError(
                f"momentum={self.momentum!r} divides by second moments of its own; got "
                f"normalise={self.normalise!r}. Leave it at 'factored'."
            )
        if self.sketch_bits in FEW_BITS and not self.stochastic_rounding:
            raise ValueError(
                f"state_bits={self.state_bits} needs stochastic_rounding=True: rounded to nearest, "
                "a momentum of few bits would not move. Leave it on, or pass state_bits=16."
            )
        if self.compress == "authors" and self.block != "full":
            raise ValueError(
                "compress='authors' is of whole sides; got "
                f"block={self.block!r}. Pass block='full', or compress='halving'."
            )
        if self.momentum in PROJECTED and self.sketch != "hadamard":
            raise ValueError(
                f"momentum={self.momentum!r} needs A A^T = (block/rank) I; got "
                f"sketch={self.sketch!r}. Use sketch='hadamard', or momentum='flora'."
            )
        if self.momentum in PROJECTED and self.transfer == "paper":
            raise ValueError(
                f"momentum={self.momentum!r} does not go with transfer='paper', which amplifies "
                "noise at every window change; got both. Use transfer='shrink' or 'reset'."
            )


def check_rank(rank: int | None, block: int | str, bits: int) -> None:
    """Refuse a rank that saves nothing: as many numbers as a block has elements, in as many bits.

    Raises:
        ValueError: naming rank, block and bits.
    """
    if rank is None or block == "full":
        return
    few = bits in FEW_BITS
    if rank > int(block) or (rank == int(block) and not few):
        rule = "must not exceed" if few else "must be below"
        remedy = "" if few else ", keep its numbers in 8 bits or fewer"
        raise ValueError(
            f"rank {rule} block; got rank={rank}, block={block}, {bits} bits. Lower rank{remedy}, "
            "or set rank=None to keep the group dense."
        )


def _check_scaling(value: Any) -> None:
    if value is not True and value is not False:
        raise ValueError(
            f"scale_parameter must be True, False or {RELATIVE!r}; got {value!r}. Pass one of them."
        )


def check_bits(name: str, value: Any, choices: tuple[int, ...]) -> None:
    """Refuse bits per number that do not exist."""
    if not is_whole(value) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}. Pass one of "
            "these."
        )


LONGEST_TYPO = 2
"""Letters that a mistyped setting may have too many or too few."""
KNOBS = tuple(field.name for field in fields(FloraConfig))
"""Names of a group's settings, in order."""


RATES: Mapping[str, Any] = {"weight_decay": 0.0, "maximize": False, "betas": ()}
"""Keys beside the knobs, with their defaults; ``lr`` has none that a saved run may go on with.
"betas" is where schedulers leave a momentum for the next step."""
BEFORE: Mapping[str, Any] = {}
"""What states were made with before a setting existed, for each that was added after format v1
with another default: name -> how it was."""
_ONLY_OURS = ("rank", "sketch", "seed")
"""Settings that states of format v1 have always had, and other optimizers' have not."""


def completed(saved: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a saved group, with what was no setting yet when it was saved.

    None: they are another optimizer's.

    >>> completed({"rank": 8, "sketch": "hadamard", "seed": 0, "lr": 1e-3})["kappa"]
    1000
    >>> completed({"lr": 1e-3, "betas": (0.9, 0.999)}) is None
    True
    """
    if not {*_ONLY_OURS, "lr"} <= set(saved):
        return None
    then = {**{field.name: field.default for field in fields(FloraConfig)}, **RATES, **BEFORE}
    return {**saved, **{name: value for name, value in then.items() if name not in saved}}


def config_of(group: Mapping[str, Any]) -> FloraConfig:
    """The checked settings of a parameter group (a dict of torch.optim)."""
    return FloraConfig(**{knob: group[knob] for knob in KNOBS})


def check_settings(group: Mapping[str, Any]) -> FloraConfig:
    """Refuse any setting of a group that cannot be right; those of ``config_of``."""
    config = config_of(group)
    for name in ("lr", "weight_decay"):
        check_rate(name, group[name])
    check_bool("maximize", group["maximize"])
    return config


def check_rate(name: str, value: Any) -> None:
    """Refuse a negative, infinite or NaN ``lr`` or ``weight_decay``; tensors pass unread."""
    if isinstance(value, (int, float)):
        check_range(name, value, 0.0, math.inf)
    elif not hasattr(value, "numel") or value.numel() != 1:
        raise ValueError(
            f"{name} must be a number or a tensor of one; got {value!r}. Pass a float."
        )


def check_bool(name: str, value: Any) -> None:
    """Refuse anything but True and False: "no" would be true."""
    if value is not True and value is not False:
        raise ValueError(f"{name} must be True or False; got {value!r}. Pass a bool.")


def check_group_keys(keys: Collection[str], known: Collection[str]) -> None:
    """Refuse a group key that is nearly a setting's name: a typo would be ignored silently.

    Other unknown keys are the user's own tags, which torch allows.
    """
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        # Longer tags are somebody's own: weight_decay_mult, initial_weight_decay.
        if near and abs(len(near[0]) - len(key)) <= LONGEST_TYPO:
            raise ValueError(
                f"a parameter group has the unknown key {key!r}. Did you mean {near[0]!r}?"
            )

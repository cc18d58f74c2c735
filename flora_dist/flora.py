# SPDX-License-Identifier: Apache-2.0
"""The Flora optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from flora_dist.core.comm.groups import Peers, process_rank
from flora_dist.core.consistency import compare as consistency
from flora_dist.core.parameters import loading
from flora_dist.core.parameters import names as naming
from flora_dist.core.parameters.advice import advice, advice_on_rate
from flora_dist.core.parameters.ahead import Ahead
from flora_dist.core.parameters.checks import (
    check_as_torch_has_it,
    check_group,
    check_keys,
    check_levels,
    check_named,
    check_not_in_turns,
    create_states,
    defaults_from,
)
from flora_dist.core.parameters.first_step import Beginning
from flora_dist.core.parameters.norms import clip_factor, global_norm, scale_
from flora_dist.core.parameters.registry import Registry, device_types_of, takes_part
from flora_dist.core.parameters.report import Report
from flora_dist.core.parameters.roles import split
from flora_dist.core.parameters.source import DenseGradients, GradientSource
from flora_dist.core.parameters.trainable import Trainable
from flora_dist.core.parameters.turns import Player, take_turn
from flora_dist.core.protocols import Layout
from flora_dist.core.sketch.ops import exact_products
from flora_dist.core.state.betas import from_betas
from flora_dist.core.state.bounds import check_whole
from flora_dist.core.state.presets import APOLLO, PAPER, RACS, SCALE
from flora_dist.core.state.settings import BETA1
from flora_dist.core.state.spec import LEVELS
from flora_dist.core.step.gradient import Gradient
from flora_dist.core.step.phases import check_not_captured, run_step
from flora_dist.kernels.choice import at_once_of, phases_of, said_of
from flora_dist.kernels.use import use_kernels

use_kernels()


class Flora(torch.optim.Optimizer):
    """Adafactor's second moment with momentum kept as random projections (arXiv 2402.03293).

    Each row of a matrix is cut in blocks; a block's momentum is ``rank`` numbers, its product with
    a random matrix A regenerated from ``seed``, the parameter's name and the step's window. Every
    rank keeps only the state of its own shard, and the same seed gives the same run on one
    process, DDP, FSDP1, FSDP2, HSDP, tensor parallelism and ZeRO 0 to 3, to rounding: with
    ``state_dtype="float32"`` to float rounding.

    On plain tensors ``step()`` sends nothing. On DTensors it sends one message of sums, as an
    all-reduce for each sharded axis of the mesh; ``flora_strict`` and ``apollo`` add one message,
    and sharded columns add another. Under ZeRO and FSDP1 it sends one all-reduce, and from three
    ranks on an exchange before it among those that share a cut row. Parameters that are sharded
    over other axes have messages of their own. More parameters do not mean more messages. More
    ranks do not mean more bytes from each, but where more than two of them share a row.

    Args:
        params: parameters, groups, or ``model.named_parameters()`` (preferred: random
            matrices depend on names; without names, on positions).
        lr: step size; a number or a tensor.
        rank: numbers kept per block; None keeps a group dense.
        block: consecutive row elements per block, a power of two, or "full": the smaller of rows
            and columns.
        compress: "halving" (every matrix whose momentum it halves, along its rows) or "authors"
            (2-D ones of an aspect ratio of at most 4 and a rank up to the smaller side, along that
            side; matrices with fewer rows than columns must be whole). Needs ``block="full"``.
        sketch: "hadamard" (least noise), "gaussian" (the paper) or "rademacher".
        momentum: "blend" (momentum inside the sketched subspace, the gradient itself outside),
            "ademamix" (the gradient and a slow average of it, added: arXiv 2502.02431),
            "subspace_adam" (Adam inside the subspace, the gradient itself outside: near Alice-0,
            arXiv 2502.07752), "apollo" (the gradient, scaled block by block as Adam scales its
            sketch: arXiv 2412.05270), "flora" (the authors' code), "flora_strict" (Algorithm 2),
            "vectors" (for 1-D parameters alone) or "none". "subspace_adam" and "apollo" keep twice
            as many numbers.
        blend_gain: weight of the sketched momentum under "blend", "ademamix" and "subspace_adam";
            of "blend" above 1 only where noise hides the limit on lr that it brings
            (core/step/momentum_rules.py); None: min(2, block / (2 rank)), as in older runs.
        beta1: decay of the momentum.
        kappa: steps between projections.
        transfer: momentum at a new projection: "shrink" (least squares), "paper" or "reset".
        beta2: decay of the second moment, bias-corrected as in Adam; None: 1 - t^-0.8.
        normalise: what a matrix is divided by: "factored" (the root of Adafactor's second moment),
            "rows" or "columns" (the root of their mean squares in this gradient alone, as in
            SCALE), or "racs" (as "factored", but row means weigh columns by theirs, and the other
            way round: arXiv 2502.07752).
        eps: added to squared gradients; 1-D parameters use at least 1e-12, and sketched numbers
            of ``subspace_adam`` 1e-8.
        clip: largest root mean square of an update, per matrix; None: no clipping.
        growth: largest growth of a matrix's update from step to step, as a factor of its norm, in
            place of ``clip``: 1.01 in Fira and APOLLO.
        orthogonalise: side of the square tiles of a matrix's update whose singular values are made
            alike, as Muon does with whole matrices; each keeps its size. Needs tiles that are whole
            on a rank. Not for head and embedding: pass None for them in ``roles``.
        weight_decay: decoupled, times lr.
        scale_parameter: True: multiply lr by max(1e-3, RMS(weight)), as Adafactor does. "relative":
            multiply a matrix's lr by RMS(weight) over what that was at its first step, within 1/2
            and 2, so that it starts as AdamW's and grows with the matrix; one that starts with an
            RMS of at most 1e-3 keeps its lr.
        state_dtype: momentum in "float32" (float64 for float64 parameters) or "bfloat16"; None:
            sketches by ``state_bits``, dense momenta in float32.
        state_bits: of each number of a sketched momentum: 32, 16, or 8 or 4 with a scale per block;
            None: as ``state_dtype``, and where that is None too 8, but 32 for rules that keep two
            moments and without stochastic rounding. With rank as large as block a dense momentum in
            few bits: {"rank": 64, "block": 64}.
        stochastic_rounding: round low-precision weights and momentum stochastically, with bits
            that are equal wherever the inputs are.
        skip_nonfinite: skip the whole step if a gradient, or its square (from 1.8e19 on in
            float32), holds NaN or inf; in any group, for all.
            DeepSpeed steps group after group: there each decides for itself.
        strict: raise where a matrix expected to be compressed would be dense.
        seed: one per run, equal on all ranks.
        maximize: step uphill.
        check_every: steps from one ``check_consistency()`` to the next; None: only where gradients,
            ZeRO or FSDP1 are attached and where a checkpoint is loaded. One for all groups.
        roles: settings of the parameters that play a role ("head", "embedding", "value" for
            attention's, "other") or whose name fits a pattern: {"head": {"rank": None}, "*.A_log":
            {"rank": None}, "embedding": {"momentum": "none"}}. Patterns come before roles, settings
            that a group names itself before both. Needs names; a tied weight has one.
        betas: (beta1, beta2) as frameworks pass them, in place of these two.
        foreach: how torch's optimizers loop; taken and ignored.
        fused: likewise.
        capturable: only False.
        differentiable: only False.

    Each setting may stand in a parameter group. A parameter without a gradient is skipped. If only
    some ranks have a gradient, those of the others count as zero. A frozen parameter is skipped
    even if it has a ``.grad``.

    >>> import torch
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = Flora(model.named_parameters(), lr=1e-3)
    >>> report = optimizer.report()
    >>> report.state_bytes, report.adamw_bytes
    (2176, 33280)

    Raises:
        ValueError: a setting, a shape or a name that cannot be right; nothing has changed then.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = 16,
        block: int | str = 64,
        compress: str = "halving",
        sketch: str = "hadamard",
        momentum: str = "blend",
        blend_gain: float | None = 1.0,
        beta1: float = BETA1,
        kappa: int = 1000,
        transfer: str = "shrink",
        beta2: float | None = None,
        normalise: str = "factored",
        eps: float = 1e-30,
        clip: float | None = 1.0,
        growth: float | None = None,
        orthogonalise: int | None = None,
        weight_decay: float | Tensor = 0.0,
        scale_parameter: bool | str = False,
        state_dtype: str | None = None,
        state_bits: int | None = None,
        stochastic_rounding: bool = True,
        skip_nonfinite: bool = False,
        strict: bool = False,
        seed: int = 0,
        maximize: bool = False,
        check_every: int | None = None,
        roles: Mapping[str, Mapping[str, Any]] | None = None,
        betas: tuple[float, float | None] | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = defaults_from(locals())
        self._rhythm = consistency.Rhythm(check_every)
        self._roster = Registry(phases_of, at_once_of)
        self._announced = False
        self._source: GradientSource = DenseGradients()
        self._beginning, self._player, self.ahead = Beginning(), Player(), Ahead()
        super().__init__(split(naming.as_groups(params), roles), defaults)

    @classmethod
    def paper(
        cls, params: Any, lr: float | Tensor = 1e-3, *, rank: int = 256, **settings: Any
    ) -> Flora:
        """The authors' algorithm: whole rows, Gaussian, transfer without scale, parameter scale.

        With their random numbers it is theirs to 1e-15 for rows >= columns, and for Algorithm 1. It
        differs for fewer rows, which theirs combines: ours cuts each row in blocks of so many
        columns, with as many numbers and the same mean error; for a rank above columns / 2 (theirs
        projects, ours is dense) and an aspect ratio above 4 (theirs is dense). With
        ``compress="authors"`` it is theirs there too, to 1e-12, on one process and DDP; where a
        layout cuts a matrix that has fewer rows than columns, and for sketched gradients, that is
        refused. It differs always in weight decay (theirs lr RMS(W) wd, ours lr wd); in 1-D
        parameters of tiny gradients (eps), 3-D and 4-D ones; and in low precision, which ours
        rounds stochastically by default. ``settings`` override the preset.
        """
        return cls(params, lr, rank=rank, **{**PAPER, **settings})

    @classmethod
    def scale(cls, params: Any, lr: float | Tensor = 1e-3, **settings: Any) -> Flora:
        """SCALE (arXiv 2506.16659): no state but a momentum for the head, and Adam's for vectors.

        Matrices are divided by the norms of their rows, which are outputs, an embedding by those of
        its columns. Needs names, by which head and embedding are known. It differs from the paper
        in the head, whose normalised gradient is averaged (theirs averages the gradient and
        normalises the mean), in 1-D parameters (theirs Adam, whose first moment is corrected for
        its start), and in ``eps``. Row and column means are kept, as under any setting, and not
        read. ``settings`` override the preset.
        """
        return cls(params, lr, **{**SCALE, **settings})

    @classmethod
    def apollo(cls, params: Any, lr: float | Tensor = 1e-3, **settings: Any) -> Flora:
        """APOLLO (arXiv 2412.05270): the gradient, scaled by channel as Adam scales its sketch.

        It differs from the paper in its channels, which are blocks of a row (theirs whole rows or
        columns of the longer side; ``block="full", sketch="gaussian"`` makes them so where rows are
        not fewer than columns), each of which has moments of ``rank`` numbers; in lr, which is
        Adam's (theirs is sqrt(block / rank) times that); in moments at a new projection, which are
        moved to it (theirs stay as they are); and in 1-D parameters and embeddings, for which
        theirs is Adam. APOLLO-Mini's one scale for a whole matrix is not here. ``settings``
        override the preset.
        """
        return cls(params, lr, **{**APOLLO, **settings})

    @classmethod
    def racs(cls, params: Any, lr: float | Tensor = 1e-3, **settings: Any) -> Flora:
        """RACS (arXiv 2502.07752): rows and columns scaled, and no momentum but the vectors'.

        Its state is a number for each row and column. It differs from the paper in the iteration
        that finds them, of which each step takes one turn from the last step's averages (theirs
        five from ones); in averages, which are corrected for their start; in lr, which is theirs
        times their scale alpha (0.02 x 0.05); and in the head, embeddings and 1-D parameters, for
        which theirs is Adam: here the first two are scaled like other matrices, and vectors have
        Adam's moments with betas of 0.9. Give the head a momentum by ``roles={"head":
        {"momentum": "blend", "rank": None}}``. ``settings`` override the preset.
        """
        return cls(params, lr, **{**RACS, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with any settings of their own; their steps count from 1."""
        group = from_betas(naming.tidy_group(param_group))
        check_keys(group, self.defaults)
        check_as_torch_has_it(group)
        merged = {**self.defaults, **group}
        check_group(merged)
        naming.check_unique(naming.names_of([*self.param_groups, group]))
        super().add_param_group(group)
        self._roster.enter(self.param_groups[-1]["params"])

    def take_names(self, model: nn.Module) -> None:
        """Give parameters the model's names, before the first step; names they have stay.

        For optimizers that a framework has built from ``model.parameters()``. Call it on every
        rank, after sharding.

        Raises:
            ValueError: a parameter is not the model's, or a step was taken without names.
        """
        if not naming.are_named(self.param_groups):
            naming.give_names(self.param_groups, model, self.state)
            self._roster.forget()

    def attach_layout(
        self, layout: Layout, tensors: Sequence[Sequence[Tensor]] | None = None
    ) -> None:
        """Let an integration say how tensors are held; the last one attached is asked first.

        Copies of the optimizer (pickle, deepcopy) go without: attach again.

        Args:
            layout: claims the tensors that the framework has put into the groups.
            tensors: what each group holds at its steps, for a framework that takes tensors out of
                the groups between them (ZeRO-3); None: what stands in the groups.

        Raises:
            ValueError: there is state already, of other tensors than the layout's.
        """
        if self.state:
            raise ValueError(
                "a layout must be attached before the first step; this optimizer has state for "
                f"{len(self.state)} tensors. Attach right after the engine is built."
            )
        self._roster.attach(layout, tensors)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_not_captured()
        self._update()
        return loss

    # A compiler gains nothing here, and traced for minutes what names and settings decide.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    @torch.no_grad()
    def _update(self) -> None:
        if self._roster.is_rehearsal(self.param_groups, self.state):
            return
        slots = self._present_slots()
        left = self.ahead.left_of(slots) if self.ahead.tensor_ids else slots
        if left or not slots:
            self._step(left)
        self.ahead.tensor_ids.clear()
        if not self._roster.is_stepped_in_turns:
            self._source.forget()
        if self._rhythm.every is not None:
            self._rhythm.count(self, slots)

    @torch.no_grad()
    def step_ahead(self, tensors: Sequence[Tensor]) -> None:
        """Step these parameters now, for integrations; the coming ``step()`` leaves them out.

        Ranks that share them call it together. Their gradients are the caller's to free.

        Raises:
            ValueError: their group skips whole steps (``skip_nonfinite``); nothing has changed.
        """
        check_not_captured()
        wanted = set(map(id, tensors))
        everything = self._roster.present(self.param_groups, self.state)
        slots = [s for s in everything if id(s.tensor) in wanted and takes_part(s)]
        self._source.check(slots)
        self.ahead.take(slots)
        self._step(slots)

    def _step(self, slots: Sequence[Trainable]) -> None:
        with exact_products(device_types_of(slots)):
            self._step_exactly(slots)

    def _step_exactly(self, slots: Sequence[Trainable]) -> None:
        if any(slot.position is not None for slot in slots):
            take_turn(self._player, slots)
            if not self._beginning.is_over:
                check_named(slots)
        ordered = sorted(slots, key=attrgetter("name"))
        kept = self._roster.kept_plan(ordered, self.state)
        read = self._source.read_ahead if self.ahead.tensor_ids else self._source.read
        gradients = read(ordered)
        if kept is None:
            create_states(slots, self.state)
        self.announce()
        plan = self._roster.planned(ordered, gradients, self.state, kept)
        # torch's DCP asks for state by a step on zeros, but not under ZeRO, which has others.
        step = partial(
            run_step, plan, gradients, may_only_create_state=not self._roster.is_stepped_in_turns
        )
        # Under ZeRO a group whose turn it is may have no gradient, and zeros are gradients.
        if self._beginning.is_over or self._roster.is_stepped_in_turns:
            step()
            return
        with self._beginning.watched(ordered, gradients, self):
            step()

    @torch.no_grad()
    def check_consistency(self, group: Peers = None) -> None:
        """Compare ranks: names, shapes, seed, settings, level, steps, and statistics bit for bit.

        Column means must be equal on all ranks that hold some of a matrix; of replicas weights and
        all state. One all-reduce of 4 KiB; of large models each call reads other parameters.
        Without a process group there is nobody to compare with.

        Args:
            group: who calls this: a process group, a mesh, or the groups of its axes; None: the
                default group. Ranks with other layers, or with plain parameters of their own, do
                not belong together.

        Raises:
            ValueError: on every rank, naming the field and the ranks that differ.
        """
        consistency.check(self, group)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Norm () of the mean gradient over all parameters and ranks, for every level.

        Exact for what is dense. Of sketches sqrt(sum |C|^2), whose square is unbiased: within 12 %
        even for a gradient of rank 1. Call it on every rank after the last micro-batch: it averages
        the sketches, in place of ``step()``, and costs one small all-reduce per group of ranks.

        Raises:
            RuntimeError: under DeepSpeed, which has its own: ``engine.get_global_grad_norm()``.
        """
        return global_norm(*self._current_gradients())

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients to a ``grad_norm()`` of at most ``max_norm``; returns it as it was.

        Raises:
            ValueError: ``max_norm`` is not above 0.
            RuntimeError: under DeepSpeed, whose key is "gradient_clipping".
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be above 0; got {max_norm!r}. Raise it.")
        slots, gradients = self._current_gradients()
        norm = global_norm(slots, gradients)
        scale_(gradients, clip_factor(norm, max_norm))
        return norm

    def attach_gradients(self, source: GradientSource) -> None:
        """Let an integration say where gradients come from.

        Raises:
            ValueError: there is state already, made by the other algorithm; nothing has changed.
        """
        before = self._source
        self._use(source)
        try:
            if source.level != LEVELS[0]:
                check_levels(self.slots(), self.state)
        except ValueError:
            self._use(before)
            raise

    def _use(self, source: GradientSource) -> None:
        self._source = source
        self._roster.set_level(source.level)

    @property
    def gradients(self) -> GradientSource:
        """Where a step takes its gradients from."""
        return self._source

    @property
    def roster(self) -> Registry:
        """Who holds what, for checkpoints."""
        return self._roster

    def slots(self) -> list[Trainable]:
        """Every parameter as the optimizer holds it, for integrations; in the order of groups."""
        return self._roster.everything(self.param_groups, self.state)

    def report(self) -> Report:
        """What is compressed and what is dense and why, with bytes, on this rank.

        Before the first step too; parameters that need no gradient are left out.
        """
        slots = [slot for slot in self.slots() if takes_part(slot)]
        return Report(
            level=self._roster.level,
            rows=tuple(slot.report_row() for slot in slots),
            unnamed=sum(slot.position is not None for slot in slots),
            kernels=said_of(slots),
        )

    def advice(self, *, steps: int) -> tuple[str, ...]:
        """What is known before a run of ``steps`` steps about settings that will cost it.

        A sentence with its remedy for each: windows too few for ``flora_strict``, momentum noisier
        than gradients, an lr that looks like a relative step. Changes and prints nothing. The
        trainer and the Hugging Face Trainer say it before the first step.

        Raises:
            ValueError: ``steps`` is no whole number of at least 1.
        """
        check_whole("steps", steps, smallest=1)
        held = [(slot.geometry, slot.config) for slot in self.slots() if takes_part(slot)]
        return (*advice(held, steps), *advice_on_rate(self.param_groups))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave: dtypes bit for bit, settings as saved.

        Raises:
            ValueError: state of another model, seed, level or optimizer; nothing has changed then.
        """
        with loading.beside_torch(self, partial(self._roster.fresh, state=self.state)):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rhythm": self._rhythm, "_player": self._player.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_roster" not in self.__dict__:  # unpickled or deep-copied
            self._roster = Registry(phases_of, at_once_of)
            self._source = DenseGradients()
            self._announced = True
            self.ahead = Ahead()
            self._beginning = Beginning()  # a copy without its model has tensors that nobody trains
            for group in self.param_groups:
                self._roster.enter(group["params"])
        self._roster.forget()

    def _present_slots(self) -> list[Trainable]:
        """Those that take part in a step, in the order of groups; their gradients are sound."""
        slots = [s for s in self._roster.present(self.param_groups, self.state) if takes_part(s)]
        self._source.check(slots)
        return slots

    def _current_gradients(self) -> tuple[list[Trainable], list[Gradient]]:
        check_not_in_turns(self._roster)
        self.ahead.check_whole()
        slots = sorted(self._present_slots(), key=attrgetter("name"))
        return slots, self._source.read(slots)

    def announce(self) -> None:
        """Print the report's summary once, on process 0; the first step does if nobody has."""
        if not self._announced and process_rank() == 0:
            sys.stderr.write(self.report().summary() + "\n")
        self._announced = True


def by_position(params: Any, **settings: Any) -> Flora:
    """A Flora whose parameters are named by their places: "#0", "#1" and so on.

    For frameworks that hand over ``model.parameters()`` and let nobody else near the optimizer. The
    run is equal on every layout on which that framework gives the same parameters in the same
    order; a framework that has names trains another run of the same seed.
    """
    return Flora(naming.by_positions(params), **settings)

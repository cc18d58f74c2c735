# SPDX-License-Identifier: Apache-2.0
"""A communication hook of DDP that sends sketches of gradients, for any optimizer.

Each gradient of a bucket is multiplied by a random matrix that all ranks draw alike, the ranks sum
the products, and the bucket gets the unbiased estimate back: g' = mean(g A^T) A. A is another one
at every reduction. Nothing is kept per bucket: DDP builds its buckets again after the first one.
Shape suffix: S numbers of a message.
"""

# No postponed annotations here: register_comm_hook compares those of a hook with its own types.

import hashlib
import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed's own; typed only there
from torch.futures import Future

from flora_dist.core.comm.groups import all_reduce_
from flora_dist.core.parameters import names as naming
from flora_dist.core.records import FEW_BITS, FULL_BITS
from flora_dist.core.sketch.ops import exact_products
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.step.batch import arithmetic_dtype
from flora_dist.frameworks.ddp_bucket import (
    BucketGradient,
    BucketParameter,
    bucket_parameter,
    in_place_of,
)
from flora_dist.frameworks.ddp_records import fill_by_records
from flora_dist.gradients.report import GradientReport
from flora_dist.gradients.request import WIRE_DTYPES, SketchRequest

_SAVED = ("seed", "rank", "block", "sketch")
_full_products = threading.Lock()
"""Precision of products is set for the whole process, and callbacks have a thread of their own: a
rank that expanded in another precision than the others would drift from them."""


class FloraState:
    """What ``flora_hook`` needs; the state argument of ``register_comm_hook``, one per DDP.

    Projections are a function of seed, parameter's name and iteration: no memory per parameter,
    and ``state_dict()`` is a few numbers. Pickle and copies of DDP leave the hook behind: build and
    register it anew.

    Args:
        params: ``model.named_parameters()``; also without names, which then are positions.
        process_group: that of DDP; None: the default group.
        rank: numbers kept per block; "block": all of them, for ``wire_bits``.
        block: consecutive row elements compressed together, a power of two, or "full": the smaller
            of rows and columns.
        sketch: "hadamard" (least noise), "gaussian" or "rademacher".
        seed: one per run, equal on all ranks.
        wire_dtype: what travels: "float32" (float64 for float64 parameters) or "bfloat16".
        wire_bits: 8, 4, 2 or 1 for each number that travels, and a scale per block; their mean
            comes back in 4 or more. Backward then waits for each bucket. None: ``wire_dtype``.
        start_iteration: gradients of the iterations before this one travel as they are.

    Raises:
        ValueError: a setting or a name that cannot be right.
    """

    def __init__(  # noqa: PLR0913 - it names every setting: users and their editors read it
        self,
        params: Any,
        *,
        process_group: dist.ProcessGroup | None = None,
        rank: int | str = 8,
        block: int | str = 64,
        sketch: str = "hadamard",
        seed: int = 0,
        wire_dtype: str = "float32",
        wire_bits: int | None = None,
        start_iteration: int = 0,
    ) -> None:
        request = SketchRequest(
            gradients="compressed",
            gradient_rank=None if isinstance(rank, str) else rank,
            gradient_bits=FULL_BITS if wire_bits is None else wire_bits,
            wire_dtype=wire_dtype,
        )
        _check_numbers(rank, wire_bits)
        request.check()
        if not (type(start_iteration) is int and start_iteration >= 0):
            raise ValueError(
                f"start_iteration must be a whole number of at least 0; got {start_iteration!r}. "
                "Pass 0 to compress from the start."
            )
        # Read for its bounds alone, which are others in few bits.
        own = 1 if wire_bits is not None or isinstance(rank, str) else rank
        self._config = FloraConfig(rank=own, block=block, sketch=sketch, seed=seed, momentum="none")
        self._rank, self._wire, self.wire_bits = rank, WIRE_DTYPES[wire_dtype], wire_bits
        self._start_iteration = start_iteration
        self.process_group = process_group
        self.iteration = 0
        """Synchronised backward passes done."""
        self._is_agreed = False
        groups = naming.as_groups(params)
        names = list(naming.names_of(groups))
        naming.check_unique(names)
        tensors = [tensor for group in groups for tensor in naming.tensors_of(group)]
        self._parameters = [
            bucket_parameter(n, t, request.geometry(n, tuple(t.shape), self._config), self._config)
            for n, t in zip(names, tensors, strict=True)
        ]
        self._by_id = {id(known.tensor): known for known in self._parameters}

    def report(self) -> GradientReport:
        """Per parameter: sketched, or dense and why; bytes in the message of an iteration."""
        parameters = [known for known in self._parameters if known.tensor.requires_grad]
        return GradientReport(
            level="flora_hook", rows=tuple(known.row(self._wire) for known in parameters)
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same projections."""
        return {"iteration": self.iteration, **self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken; on every rank.

        Raises:
            ValueError: it was taken with other settings; nothing has changed then.
        """
        for name, ours in self._settings().items():
            if state_dict.get(name) != ours:
                raise ValueError(
                    f"the state of flora_hook must have {name}={ours!r}; it has "
                    f"{state_dict.get(name)!r}. Build FloraState with the settings of the run that "
                    "saved it."
                )
        self.iteration = int(state_dict["iteration"])
        self._is_agreed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "FloraState":
        """The same object: its parameters are those of the DDP that it is registered with."""
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Parameters and process group do not belong into a file."""
        raise TypeError("FloraState cannot be pickled. Save state_dict(), a few numbers.")

    # ---- for the hook

    def group(self) -> dist.ProcessGroup:
        """Whose mean is taken."""
        group = self.process_group or dist.group.WORLD
        assert group is not None, "DDP needs a process group"
        return group

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What travels of numbers in ``dtype``."""
        return self._wire or dtype

    def gradients_of(self, bucket: GradBucket) -> list[BucketGradient]:
        """The gradients of a bucket, each with its matrices of this iteration.

        Raises:
            ValueError: a parameter that the state was not given.
        """
        dtype, device = arithmetic_dtype(bucket.buffer().dtype), bucket.buffer().device
        return [
            BucketGradient(
                gradient=gradient,
                size=known.size,
                sketch_ERB=(
                    None
                    if known.sketches is None or self.is_dense
                    else known.sketches.at(self.step, dtype, device)
                ),
            )
            for known, gradient in self.pairs(bucket)
        ]

    def pairs(self, bucket: GradBucket) -> list[tuple[BucketParameter, Tensor]]:
        """The parameters of a bucket and their gradients in it.

        Raises:
            ValueError: a parameter that the state was not given.
        """
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        return [(self._known(p), in_place_of(p, gradient)) for p, gradient in pairs]

    @property
    def step(self) -> int:
        """From 1, as an optimizer's steps."""
        return self.iteration + 1

    @property
    def is_dense(self) -> bool:
        """Whether gradients travel as they are."""
        return self.step <= self._start_iteration

    def count(self, bucket: GradBucket) -> None:
        """Buckets of an iteration come in the order of their numbers, on every rank."""
        if bucket.is_last():
            self.iteration += 1

    def check_agreement(self, device: torch.device) -> None:
        """Once, and after each load: ranks that draw other projections would sum noise.

        Raises:
            ValueError: on every rank, if they do not agree.
        """
        if self._is_agreed:
            return
        facts = (self._settings(), self._wire, self._start_iteration, self.iteration)
        listed = [(known.name, known.size.shape) for known in self._parameters]
        digest = hashlib.sha256(repr((facts, listed)).encode()).digest()
        ours = int.from_bytes(digest[:7], "big")
        extremes = torch.tensor([ours, -ours], dtype=torch.int64, device=device)
        all_reduce_(extremes, self.group(), dist.ReduceOp.MAX)
        largest, smallest = extremes.tolist()
        if largest != -smallest:
            raise ValueError(
                "all ranks must give FloraState the same settings, names and iteration; they "
                f"differ, here {self.state_dict()}. Build it alike everywhere, and load its state "
                "on every rank."
            )
        self._is_agreed = True

    def _settings(self) -> dict[str, Any]:
        few = {} if self.wire_bits is None else {"wire_bits": self.wire_bits}
        return {n: getattr(self._config, n) for n in _SAVED} | {"rank": self._rank, **few}

    def _known(self, parameter: Tensor) -> BucketParameter:
        known = self._by_id.get(id(parameter))
        if known is None:
            raise ValueError(
                "flora_hook must know every parameter that DDP reduces; one of shape "
                f"{tuple(parameter.shape)} is not among those given to FloraState. Pass "
                "model.named_parameters() of the model inside DDP, as it is when DDP is built."
            )
        return known


def flora_hook(state: FloraState, bucket: GradBucket) -> Future[Tensor]:
    """All-reduce sketches of a bucket's gradients, and expand their mean into the bucket.

    ``ddp.register_comm_hook(FloraState(model.named_parameters()), flora_hook)``, before the first
    backward. 1-D parameters, and those that would not halve, travel as they are in the same
    message. ``flora_dist.attach`` also spares the memory of the gradients and the expansion, but
    for Flora alone.

    The estimate is unbiased and noisy: its squared error is about block / rank times the squared
    gradient, spread evenly over each block, new at every step, with no error feedback. An optimizer
    that works element by element sees all of it: AdamW's second moments grow by block / rank or
    more, so its steps shrink by the root of that, and small gradients drown beside large ones of
    their block. Prefer a small ratio, and tune the learning rate anew. At ratios none, 2, 4, 8, 16
    AdamW came to a validation loss of 2.33, 2.29, 2.38, 2.50, 2.58 (best of three rates, one seed,
    42 thousand weights, 400 steps), with second moments 2.4, 6.8, 12 and 25 times the dense ones
    at rate 3e-3 (``python -m tests.bench.hooked_adamw``, 2026-11-26, CPU, torch 2.13.0).

    Accumulate micro-batches under ``no_sync()``: without it DDP compresses what is already an
    estimate again, and the noise multiplies.

    Raises:
        ValueError: a parameter that the state was not given, sparse gradients, or ranks whose
            states differ.
    """
    buffer = bucket.buffer()
    if buffer.layout != torch.strided:
        raise ValueError(
            f"flora_hook needs dense gradients; those of a bucket are {buffer.layout}. Build the "
            "module with sparse=False."
        )
    state.check_agreement(buffer.device)
    if state.wire_bits is not None:
        return _filled_by_records(state, bucket, state.wire_bits)
    dtype = arithmetic_dtype(buffer.dtype)
    with torch.no_grad(), _full_products, exact_products({buffer.device.type}):
        gradients = state.gradients_of(bucket)
        message_S = torch.cat([each.numbers(dtype) for each in gradients])
    message_S = message_S.to(state.wire_dtype(dtype))
    state.count(bucket)
    world_size = state.group().size()

    def expand(summed: Future[list[Tensor]]) -> Tensor:
        (total_S,) = summed.value()
        mean_S = total_S.to(dtype) / world_size
        sizes = [each.num_numbers for each in gradients]
        with torch.no_grad(), _full_products, exact_products({buffer.device.type}):
            for gradient, numbers_S in zip(gradients, torch.split(mean_S, sizes), strict=True):
                gradient.fill_(numbers_S)
        return buffer

    sent = dist.all_reduce(message_S, group=state.group(), async_op=True)
    assert sent is not None, "DDP calls its hook on members of its group"
    future: Future[Tensor] = sent.get_future().then(expand)
    return future


def _filled_by_records(state: FloraState, bucket: GradBucket, wire_bits: int) -> Future[Tensor]:
    """What the hook does in few bits; DDP calls it in the order of buckets, on every rank."""
    buffer = bucket.buffer()
    with torch.no_grad(), _full_products, exact_products({buffer.device.type}):
        fill_by_records(
            state.pairs(bucket),
            state.group(),
            wire_bits=wire_bits,
            step=state.step,
            is_dense=state.is_dense,
        )
    state.count(bucket)
    future: Future[Tensor] = Future()
    future.set_result(buffer)
    return future


def _check_numbers(rank: int | str | None, wire_bits: int | None) -> None:
    if rank is None:
        raise ValueError(
            "rank must be a whole number of at least 1; got None, which compresses nothing. "
            "Pass 1 or more, or register no hook."
        )
    if wire_bits is not None and wire_bits not in FEW_BITS:
        raise ValueError(
            f"wire_bits must be one of {', '.join(map(str, FEW_BITS))}; got {wire_bits!r}. Leave "
            "it out for numbers in full, as wire_dtype says."
        )
    if isinstance(rank, str) and (rank != "block" or wire_bits is None):
        raise ValueError(
            'rank must be a number, or "block" for all numbers of a block, which only few bits '
            f"make smaller; got {rank!r} and wire_bits={wire_bits}. Pass a number, or wire_bits=4."
        )

# SPDX-License-Identifier: Apache-2.0
"""One parameter in the optimizer: where it is held, how it is cut, and its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flora_dist.core.parameters.names import names_of, position_name
from flora_dist.core.parameters.report import ReportRow
from flora_dist.core.parameters.roles import role_of
from flora_dist.core.parameters.transposed import as_stepped
from flora_dist.core.protocols import Layout, Part
from flora_dist.core.sketch.keys import Purpose, name_key
from flora_dist.core.sketch.matrices import KINDS
from flora_dist.core.state.settings import FloraConfig
from flora_dist.core.state.spec import (
    LEVELS,
    Geometry,
    StateTensor,
    format_of,
    geometry_of,
    has_momentum,
    state_tensors,
)
from flora_dist.core.step.basis import Sketches
from flora_dist.core.step.batch import Member, arithmetic_dtype
from flora_dist.core.step.orthogonal import check_tiles

Group = dict[str, Any]
_DTYPES = {32: "float32", 16: "bfloat16"}
_SECOND = {
    "factored": "factored second moment",
    "rows": "rows normalised",
    "columns": "columns normalised",
    "racs": "rows and columns scaled",
}


class Trainable:
    """A part with its group; geometry and sketches follow the group's settings."""

    def __init__(
        self,
        *,
        tensor: Tensor,
        part: Part,
        layout: Layout,
        group: Group,
        position: int | None,
        level: str,
    ) -> None:
        """``position``: place among the parameters if they have no names, else None."""
        self.tensor, self.part, self.group, self.level = tensor, part, group, level
        self.layout, self.position, self.name = layout, position, part.name
        self.found, self.seen = (part.shape, tensor.dtype), (tensor.shape, tensor.dtype)
        self.stepped = part  # as the step sees it: itself, or transposed
        self._name_key = name_key(part.name)
        self._config: FloraConfig | None = None

    def configure(self, config: FloraConfig, state: dict[str, Any]) -> None:
        """Follow the group's settings; state that does not fit them any more is refused."""
        if config == self._config:
            return
        self._config = None  # until everything below has passed
        part = self.part
        self._geometry = geometry_of(part.name, part.shape, config)
        self.stepped = as_stepped(part, self._geometry)
        self._entries = state_tensors(self._geometry, config)
        if part.trains:
            check_compressed(part.name, self._geometry, config)
        check_tiles(self.stepped, self._geometry, config.orthogonalise)
        if self.has_state(state):
            check_state(self, self.own_state(state), config)
        self._cuts = self.stepped.cuts(self._geometry.block)
        self._sketches = self._make_sketches(config)
        self._config = config

    def _make_sketches(self, config: FloraConfig) -> Sketches | None:
        if self._geometry.rank is None or not has_momentum(self._geometry, config):
            return None
        shapes = [self.stepped.local_state_shape(e) for e in self._entries if e.name == "momentum"]
        return Sketches(
            name_key=self._name_key,
            purpose=Purpose.MOMENTUM,
            rank=self._geometry.rank,
            block=self._geometry.block,
            config=config,
            held=self.stepped.matrices,
            kept=sum(torch.Size(shape).numel() for shape in shapes),
        )

    @property
    def config(self) -> FloraConfig:
        """The group's settings."""
        assert self._config is not None
        return self._config

    @property
    def name_key(self) -> int:
        """What the parameter's random numbers are derived from, besides the seed."""
        return self._name_key

    @property
    def entries(self) -> tuple[StateTensor, ...]:
        """The parameter's state tensors, all ranks together."""
        return self._entries

    @property
    def geometry(self) -> Geometry:
        """How the parameter is cut."""
        return self._geometry

    @property
    def column_shards(self) -> int | None:
        """How many ranks cut blocks of the momentum among them; None where no block is cut so.

        The momentum's shape depends on it, so the state holds it: another layout could misread it.
        """
        is_sketched = any(e.name == "momentum" and e.along == "rows" for e in self._entries)
        if not is_sketched or self.part.column_shards == 1:
            return None
        is_cut = self.part.cuts(self._geometry.block).blocks_anywhere
        return self.part.column_shards if is_cut else None

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """This parameter's state inside its tensor's."""
        return self.layout.state_of(state, self.part)

    def has_state(self, state: dict[str, Any]) -> bool:
        """Whether the parameter has taken part in a step."""
        return "step" in self.own_state(state)

    def create_state(self, state: dict[str, Any]) -> None:
        """Zeros and counters; tensors and numbers only, so that any loader can carry them."""
        assert self._config is not None
        own = self.own_state(state)
        for entry in self._entries:
            own[entry.name] = self.stepped.allocate(entry, self.dtype_of(entry))
        own.update(
            format=format_of(self._entries),
            gradients=LEVELS.index(self.level),
            seed=self._config.seed,
            sketch=KINDS.index(self._config.sketch),
            step=0,
            window=0,
        )
        if self.position is not None:
            own["position"] = self.position
        if self.column_shards is not None:
            own["column_shards"] = self.column_shards
        if own is not state:
            state[self.part.name] = own

    def dtype_of(self, entry: StateTensor) -> torch.dtype:
        """What a state tensor is kept in."""
        if entry.dtype == "uint8":
            return torch.uint8
        if entry.dtype == "bfloat16":
            return torch.bfloat16
        return arithmetic_dtype(self.tensor.dtype)

    def next_step(self, state: dict[str, Any]) -> int:
        """The parameter's coming step, counted from 1."""
        return int(self.own_state(state).get("step", 0)) + 1

    def member(self, state: dict[str, Any]) -> Member:
        """The parameter, which has state, as a step sees it."""
        part, own = self.stepped, self.own_state(state)
        kept = {entry.name: own[entry.name] for entry in self._entries}
        local = {name: part.local(tensor) for name, tensor in kept.items()}
        return Member(
            name=self.name,
            tensor=self.tensor,
            part=part,
            layout=self.layout,
            geometry=self._geometry,
            config=self.config,
            group=self.group,
            name_key=self._name_key,
            sketches=self._sketches,
            tiles=part.tiles,
            matrices=part.matrices,
            cuts=self._cuts,
            state=own,
            kept=kept,
            local=local,
            weight=part.weight(),
            address=part.address(),
            local_addresses=tuple(tensor.data_ptr() for tensor in local.values()),
        )

    def report_row(self) -> ReportRow:
        """What is kept for the parameter on this rank, from the list of state tensors."""
        assert self._config is not None
        size = self._geometry
        state_bytes = sum(
            torch.Size(self.stepped.local_state_shape(entry)).numel()
            * self.dtype_of(entry).itemsize
            for entry in self._entries
        )
        return ReportRow(
            name=self.part.name,
            shape=self.part.shape,
            role=role_of(self.part.name),
            how=self._how(self._config),
            is_compressed=size.rank is not None and has_momentum(size, self._config),
            local_elements=sum(tile.num_elements for tile in self.part.tiles),
            state_bytes=state_bytes,
        )

    def _how(self, config: FloraConfig) -> str:
        size = self._geometry
        if not has_momentum(size, config):
            return "no momentum, " + ("1-D" if size.is_vector else _SECOND[config.normalise])
        if size.rank is None:
            return f"dense: {size.dense_because}"
        return (
            f"{config.momentum}, {config.sketch} {size.rank} per block of {size.block}, "
            f"{_DTYPES.get(size.bits, f'{size.bits} bits')}"
        )


def check_compressed(name: str, geometry: Geometry, config: FloraConfig) -> None:
    """Refuse, under ``strict``, a matrix that compressing would not halve."""
    if config.strict and geometry.falls_short and has_momentum(geometry, config):
        raise ValueError(
            f"with strict=True every matrix must be compressed; {name!r} of shape "
            f"{geometry.shape} would be dense: {geometry.dense_because}. Lower rank, raise block, "
            "or set rank=None for its group."
        )


def check_state(slot: Trainable, own: dict[str, Any], config: FloraConfig) -> None:
    """Refuse state of another seed, sketch, level, format or shape: it would be misread.

    Raises:
        ValueError: naming the parameter, the field, both values and what to do.
    """
    wanted = {
        "format": format_of(slot.entries),
        "seed": config.seed,
        "sketch": KINDS.index(config.sketch),
    }
    for field, value in wanted.items():
        if own.get(field) != value:
            raise ValueError(
                f"the state of {slot.part.name!r} must have {field}={_meaning(field, value)!r}; it "
                f"has {_meaning(field, own.get(field))!r}. Construct the optimizer with the "
                "settings of the run that saved it."
            )
    if (own.get("position") is None) != (slot.position is None):
        raise ValueError(
            f"the state of {slot.part.name!r} must have position={slot.position!r}; it has "
            f"{own.get('position')!r}. Construct the optimizer with named parameters if, and only "
            "if, the run that saved the state had them."
        )
    if own.get("column_shards") != slot.column_shards:
        raise ValueError(
            f"the momentum of {slot.part.name!r} must have its blocks cut among "
            f"{slot.column_shards or 'no'} ranks by columns; the state's are cut among "
            f"{own.get('column_shards') or 'none'}. Cut blocks in torch's own checkpoints load "
            "only on the same layout: use flora_dist.checkpoint.save and load."
        )
    _check_tensors(slot, own)


def _check_tensors(slot: Trainable, own: dict[str, Any]) -> None:
    kept = {name for name, value in own.items() if isinstance(value, Tensor)}
    expected = {entry.name: entry for entry in slot.entries}
    if kept != set(expected):
        raise ValueError(
            f"the state of {slot.part.name!r} must hold {sorted(expected)}, for a weight of "
            f"{slot.part.shape}; it holds {sorted(kept)}. momentum, growth and "
            "a relative lr cannot change once there is state, nor can a matrix become a vector."
        )
    for name, entry in expected.items():
        shape = tuple(slot.part.local(own[name]).shape)
        if shape != slot.stepped.local_state_shape(entry):
            raise ValueError(
                f"{name} of {slot.part.name!r} must have the local shape "
                f"{slot.stepped.local_state_shape(entry)}, for a weight of {slot.part.shape}; the "
                f"state has {shape}. Use the rank, block, state_bits and model of the run that "
                "made it; if the weight was resized since, make a new optimizer."
            )
        if own[name].dtype != slot.dtype_of(entry):
            raise ValueError(
                f"{name} of {slot.part.name!r} must be {slot.dtype_of(entry)}, for a weight of "
                f"{slot.tensor.dtype}; the state has {own[name].dtype}. Use the state_dtype, the "
                "state_bits and the model's dtype that the state was made with."
            )


def check_level(slot: Trainable, own: dict[str, Any]) -> None:
    """Refuse state of dense gradients under sketched ones, and the reverse.

    What reads expand(C) is another algorithm than what reads G; how C came about is not.

    Raises:
        ValueError: naming the parameter and both levels.
    """
    saved = _meaning("gradients", own.get("gradients"))
    if saved not in LEVELS or (saved == LEVELS[0]) != (slot.level == LEVELS[0]):
        raise ValueError(
            f"the state of {slot.part.name!r} must have gradients={slot.level!r}; it has "
            f"{saved!r}. Attach with the level and the settings of the run that saved it."
        )


def _meaning(field: str, number: Any) -> Any:
    """What a number of the state stands for, or itself."""
    names = dict(enumerate({"gradients": LEVELS, "sketch": KINDS}.get(field, ())))
    return names.get(number, number)


def make_trainables(
    groups: Sequence[Group],
    state: Mapping[Tensor, dict[str, Any]],
    layouts: Sequence[Layout],
    level: str,
) -> list[Trainable]:
    """Every part of every parameter, in the order of the groups."""
    slots = []
    entries = [(group, tensor) for group in groups for tensor in group["params"]]
    for index, (name, (group, tensor)) in enumerate(zip(names_of(groups), entries, strict=True)):
        position = None
        if "param_names" not in group:  # the place at the first step stays, whatever comes later
            position = state.get(tensor, {}).get("position", index)
            name = position_name(position)
        layout = next((layout for layout in layouts if layout.claims(tensor)), None)
        if layout is None:
            raise TypeError(
                f"a parameter must be a plain tensor or a DTensor; {name!r} is a "
                f"{type(tensor).__name__}. Attach a layout that can read it (Flora.attach_layout)."
            )
        slots += [
            Trainable(
                tensor=tensor,
                part=part,
                layout=layout,
                group=group,
                # A layout may know the names that the groups lack.
                position=position if part.name == name else None,
                level=level,
            )
            for part in layout.parts(tensor, name)
        ]
    return slots

# SPDX-License-Identifier: Apache-2.0
"""Which tensors the optimizer steps, by which layout, and whether it knows them at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, eq
from typing import Any

from torch import Tensor

from flora_dist.core.layouts.dtensor import DTensorLayout
from flora_dist.core.layouts.replicated import ReplicatedLayout
from flora_dist.core.parameters.trainable import Group, Trainable, make_trainables
from flora_dist.core.protocols import Layout, Part
from flora_dist.core.state.betas import take_betas
from flora_dist.core.state.settings import KNOBS, config_of
from flora_dist.core.state.spec import LEVELS
from flora_dist.core.step.gradient import Gradient
from flora_dist.core.step.plan import AtOnceOf, PhasesOf, Plan, Plans, make_plan

State = Mapping[Tensor, dict[str, Any]]
Signature = tuple[tuple[int, ...], ...]
"""Which groups and tensors are stepped together, by identity."""
MOST_SELECTIONS = 256


class Registry:
    """Layouts, the tensors given to the constructor, and slots once they are needed."""

    def __init__(self, phases_of: PhasesOf, at_once_of: AtOnceOf) -> None:
        """``phases_of``: how a batch of a plan is stepped; ``at_once_of``: all in one go."""
        self._phases_of, self._at_once_of = phases_of, at_once_of
        self._layouts: list[Layout] = [DTensorLayout(), ReplicatedLayout()]
        self._resident: Sequence[Sequence[Tensor]] | None = None
        self.level = LEVELS[0]
        # Frameworks put other tensors into the groups before the first step (accelerate's FSDP2,
        # DeepSpeed): nothing is kept per parameter but who was given, as (id, elements). Not
        # as references, which would keep whole parameters alive; not as weak ones either, with
        # which a module's to_empty() refuses to swap its parameters (torch.utils.swap_tensors).
        self._given: set[tuple[int, int]] = set()
        self.forget()

    def enter(self, tensors: Iterable[Tensor]) -> None:
        """Take in tensors that the user gave."""
        self._given.update(map(_identity, tensors))
        self.forget()

    def attach(self, layout: Layout, tensors: Sequence[Sequence[Tensor]] | None) -> None:
        """Ask this layout first; ``tensors`` are what each group holds when it is stepped."""
        self._layouts.insert(0, layout)
        self._resident = tensors
        self.forget()

    def set_level(self, level: str) -> None:
        """What of the gradients is compressed from now on."""
        self.level = level
        self.forget()

    def forget(self) -> None:
        """Drop what is derived from groups and parameters."""
        self._slots: dict[Signature, list[Trainable]] = {}
        self._settings: dict[Signature, list[tuple[Any, ...]]] = {}
        self._plans = Plans()

    def present(self, groups: Sequence[Group], state: State) -> list[Trainable]:
        """What stands in the groups now, configured by their settings."""
        _take_betas(groups)
        # ZeRO steps its groups and sub-groups one by one: each selection has slots of its own.
        # Slots hold the groups and tensors, so an id in the signature is not used again.
        signature = tuple((id(g), *map(id, g["params"])) for g in groups)
        slots = self._slots.get(signature)
        # A weight that was replaced in place by one of another shape or dtype.
        outdated = _outdated(slots or ())
        if slots is None or outdated:
            self._given.update(map(_identity, outdated))
            if outdated or len(self._slots) >= MOST_SELECTIONS:
                self.forget()
            slots = self._slots[signature] = self.fresh(groups, state)
        settings = [_settings_of(group) for group in groups]
        if settings != self._settings.get(signature):
            self._plans = Plans()
            self._settings.pop(signature, None)  # until all have passed
            _configured(slots, state)
            self._settings[signature] = settings
        return slots

    def kept_plan(self, slots: Sequence[Trainable], state: State) -> Plan | None:
        """The plan of these slots' last step; None where it does not hold any more."""
        # Slots live as long as the plans do, so their ids are not used again.
        return self._plans.find(tuple(map(id, slots)), state)

    def planned(
        self,
        slots: Sequence[Trainable],
        gradients: Sequence[Gradient],
        state: State,
        kept: Plan | None,
    ) -> Plan:
        """The plan of a step of these slots, which have state: the kept one, if it fits."""
        if kept is not None and kept.kinds == [type(gradient) for gradient in gradients]:
            return kept
        members = [slot.member(state[slot.tensor]) for slot in slots]
        plan = make_plan(members, gradients, self._phases_of, self._at_once_of)
        self._plans.keep(tuple(map(id, slots)), plan)
        return plan

    def everything(self, groups: Sequence[Group], state: State) -> list[Trainable]:
        """Also of tensors that the host has taken out of the groups for now."""
        if self._resident is None:
            return self.present(groups, state)
        _take_betas(groups)
        return _configured(self.fresh(self.filled(groups), state), state)

    def filled(self, groups: Sequence[Group]) -> list[Group]:
        """Copies of the groups with what each holds when it is stepped."""
        tensors = self._resident or [group["params"] for group in groups]
        pairs = zip(groups, tensors, strict=True)
        return [{**group, "params": list(own)} for group, own in pairs]

    def parts_of(self, tensor: Tensor, name: str) -> tuple[Part, ...]:
        """What stands in a tensor that need not be the optimizer's."""
        layout = next((layout for layout in self._layouts if layout.claims(tensor)), None)
        return () if layout is None else layout.parts(tensor, name)

    def fresh(self, groups: Sequence[Group], state: State) -> list[Trainable]:
        """New slots, not configured yet.

        Raises:
            ValueError: an engine put its flat partition, or FSDP1 its views of one, among the
                parameters and nobody attached.
        """
        for group in groups:
            for tensor in group["params"]:
                if is_marked_by_fsdp1(tensor) and self._is_unclaimed(tensor):
                    raise ValueError(
                        "parameters that FSDP1 has flattened must be attached; one of shape "
                        f"{tuple(tensor.shape)} on this rank is not, and stepping it as it is "
                        "would keep dense state. Call flora_dist.fsdp1.attach(model, optimizer) "
                        "after wrapping."
                    )
                if tensor.ndim == 1 and self._is_foreign(tensor):
                    raise ValueError(
                        "every 1-D tensor must have been given to the optimizer; one of "
                        f"{tensor.numel()} elements was not: an engine put its flat partition "
                        "here, and compressing that as a vector would keep dense state. Under "
                        "DeepSpeed call flora_dist.deepspeed.attach(engine), elsewhere the "
                        "engine's attach(); for one that was resized since, make a new optimizer."
                    )
        return make_trainables(groups, state, self._layouts, self.level)

    def is_rehearsal(self, groups: Sequence[Group], state: State) -> bool:
        """Whether an engine steps its own tensors on zeros while it is being built.

        DeepSpeed's FP16_UnfusedOptimizer does, in its constructor, before anybody can attach.
        """
        if state:
            return False
        tensors = [tensor for group in groups for tensor in group["params"]]
        if not all(map(self._is_foreign, tensors)):
            return False
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)

    @property
    def is_stepped_in_turns(self) -> bool:
        """Whether the host steps its groups one after the other (ZeRO)."""
        return self._resident is not None

    @property
    def turns(self) -> list[Tensor]:
        """What the host steps one after the other, in its order; empty where all at once."""
        return [tensor for tensors in self._resident or () for tensor in tensors]

    def _is_foreign(self, tensor: Tensor) -> bool:
        """A plain tensor that no integration claims and nobody gave."""
        return _identity(tensor) not in self._given and self._is_unclaimed(tensor)

    def _is_unclaimed(self, tensor: Tensor) -> bool:
        layout = next((layout for layout in self._layouts if layout.claims(tensor)), None)
        return isinstance(layout, ReplicatedLayout)


def takes_part(slot: Trainable) -> bool:
    """Whether a parameter has a place in the step, and in its message.

    One rule on every layout, on which ranks agree: what requires no gradient now is not stepped.
    A gradient that was left over before it was frozen may be there on some ranks alone.
    """
    if 0 in slot.found[0]:  # nothing to step, and means over no rows
        return False
    return slot.part.trains


def device_types_of(slots: Sequence[Trainable]) -> set[str]:
    """Where parameters are."""
    if all(slot.tensor.is_cpu for slot in slots):  # a device's name costs more than the question
        return {"cpu"} if slots else set()
    return {slot.tensor.device.type for slot in slots}


def is_marked_by_fsdp1(tensor: Tensor) -> bool:
    """Whether FullyShardedDataParallel has cut a parameter, or is what it has cut them from."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def _outdated(slots: Sequence[Trainable]) -> list[Tensor]:
    tensors = [slot.tensor for slot in slots]
    seen = [slot.seen for slot in slots]
    # A part's shape costs more, and changes only with that of its tensor.
    if all(map(eq, map(attrgetter("shape", "dtype"), tensors), seen)):
        return []
    return [slot.tensor for slot in slots if slot.found != (slot.part.shape, slot.tensor.dtype)]


def _take_betas(groups: Sequence[Group]) -> None:
    for group in groups:
        if group.get("betas"):  # hardly ever: a scheduler has to leave them there
            take_betas(group)


def _configured(slots: list[Trainable], state: State) -> list[Trainable]:
    configs = {id(slot.group): config_of(slot.group) for slot in slots}
    for slot in slots:
        slot.configure(configs[id(slot.group)], state.get(slot.tensor, {}))
    return slots


def _settings_of(group: Group) -> tuple[Any, ...]:
    """What of a group a plan is made for."""
    return (group["maximize"], *(group[knob] for knob in KNOBS))


def _identity(tensor: Tensor) -> tuple[int, int]:
    """An id may be used again once its tensor is gone, hardly with as many elements."""
    return id(tensor), tensor.numel()

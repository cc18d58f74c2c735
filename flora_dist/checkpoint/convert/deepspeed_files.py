# SPDX-License-Identifier: Apache-2.0
"""Files of DeepSpeed's own checkpoints: pickles, loaded without running any of their code.

weights_only=True, with the few classes of DeepSpeed in them replaced by stand-ins that do nothing;
anything else is refused. Names of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_dist.checkpoint.convert.engine_facts import ENGINE, EngineFacts
from flora_dist.checkpoint.folder import Json
from flora_dist.checkpoint.json_values import split, to_json
from flora_dist.checkpoint.safe_load import StandIns, load_safely

MODEL_FILES = "*mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_KNOWN = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
    *("ds_config", "ds_version", "num_experts", "ds_autoep_layers"),
    *("checkpoint_parallel_dimensions", "universal_checkpoint_info"),
}
"""What the engine itself writes; the rest is the caller's ``client_state``."""


class _Scaler:
    """A loss scaler's attributes."""


class _Fragment:
    """Where DeepSpeed says that a parameter was; not asked."""


_STAND_INS: StandIns = [
    (_Scaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Scaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def load_file(file: Path) -> dict[str, Any]:
    """The table in a file, on the CPU.

    Raises:
        ValueError: a file that is missing or torn, or holds objects of other classes.
    """
    loaded = load_safely(file, f"'{file}'", _STAND_INS)
    if not isinstance(loaded, dict):
        raise ValueError(f"a file of DeepSpeed must hold a table; '{file}' does not.")  # noqa: TRY004
    return loaded


def optimizer_files(path: Path, world_size: int) -> list[Path]:
    """Those of every rank, in order.

    Raises:
        ValueError: one is missing, or there are two of a rank.
    """
    found: dict[int, list[Path]] = {}
    for file in path.glob("*_optim_states.pt"):
        if match := _OPTIMIZER_FILE.fullmatch(file.name):
            found.setdefault(int(match[2]), []).append(file)
    # By what is there: a file may claim any number of ranks.
    is_whole = len(found) == world_size and sorted(found) == list(range(len(found)))
    if not is_whole or any(len(own) > 1 for own in found.values()):
        raise ValueError(
            f"'{path}' must have one file of optimizer states for each of {world_size} ranks; it "
            f"has {sorted(f.name for own in found.values() for f in own)}. Copy all files, of one "
            "save alone."
        )
    return [found[rank][0] for rank in range(world_size)]


def check_world(head: Mapping[str, Any], path: Path) -> None:
    """Refuse what is cut over more than data parallel ranks, or holds experts apart."""
    if head.get("mp_world_size", 1) != 1 or head.get("ds_autoep_layers"):
        raise ValueError(
            f"only data parallel runs can be converted; '{path}' is of mp_world_size="
            f"{head.get('mp_world_size')}. Gather it with the framework that cut it."
        )


def count_in(head: Mapping[str, Any], name: str, path: Path) -> int:
    """One of the engine's counters.

    Raises:
        ValueError: it is missing, or no count.
    """
    value = head.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(
            f"DeepSpeed's counters must be whole numbers from 0; {name!r} in '{path}' is "
            f"{str(value)[:200]}. Copy all files again, as engine.save_checkpoint wrote them."
        )
    return value


def extra_of(
    head: Mapping[str, Any], loss_scale: dict[str, Json] | None
) -> tuple[dict[str, Json], tuple[str, ...]]:
    """The engine's counters and the caller's own, as our checkpoints have them; what is no JSON."""
    scheduler = head.get("lr_scheduler")
    facts = EngineFacts(
        global_samples=int(head.get("global_samples", 0)),
        skipped_steps=int(head.get("skipped_steps", 0)),
        scheduler=None if scheduler is None else to_json(scheduler, "lr_scheduler"),
        loss_scale=loss_scale,
    )
    kept, left_out = split({key: value for key, value in head.items() if key not in _KNOWN})
    return {**kept, ENGINE: facts.as_json()}, left_out

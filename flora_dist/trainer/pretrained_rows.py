# SPDX-License-Identifier: Apache-2.0
"""A network from a transformers folder of which a process reads its own part alone.

transformers itself brings names and shapes of the files to the network's, on tensors that are still
in the files (`promised`), and makes the buffers that no file holds. Then this process's rows of
each parameter are read, one parameter at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_dist.trainer.model import from_files, shapes_only
from flora_dist.trainer.place import WHOLE, Drawn, Place, Unfit
from flora_dist.trainer.promised import Promised, promises_of
from flora_dist.trainer.utf8 import read_utf8

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTERS = "adapter_config.json"


def read_rows(folder: Path, network: Any, place: Place, *, seed: int, dtype: torch.dtype) -> Drawn:
    """The network of `build_model`, of which only what a place keeps gets memory.

    Raises:
        Unfit: the folder holds something else than the network's parameters in safetensors.
    """
    kind = type(shapes_only(network))
    torch.manual_seed(seed)
    try:
        promises = _promises_in(folder, network)
        model = from_files(kind, None, config=network, state_dict=promises)
    except Unfit:
        raise
    except Exception as error:  # loading it whole says what is wrong, or does without promises
        raise Unfit(" ".join(str(error).split())) from error
    _check_ties(model)
    rows: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, Promised):
            raise Unfit(f"{name} gets its values elsewhere than from a file")
        rows[name] = parameter.rows_in(place).to(dtype)
    _without_promises(model, dtype)
    return Drawn(model=model.train(), rows=rows)


def _promises_in(folder: Path, network: Any) -> dict[str, Tensor]:
    """What transformers would load."""
    if (folder / _ADAPTERS).is_file():
        raise Unfit(f"'{folder}' holds adapters")
    for key in ("quantization_config", "transformers_weights"):
        if getattr(network, key, None) is not None:
            raise Unfit(f"its config has {key}")
    if getattr(type(network), "extra_files", None):
        raise Unfit("its config names more files")
    if (folder / _ONE).is_file():
        files = [folder / _ONE]
    elif (folder / _INDEX).is_file():
        files = _files_of(folder / _INDEX)
    else:
        raise Unfit(f"'{folder}' has neither {_ONE} nor {_INDEX}")
    return {name: tensor for file in files for name, tensor in promises_of(file).items()}


def _files_of(index: Path) -> list[Path]:
    names = set(json.loads(read_utf8(index))["weight_map"].values())
    return [index.parent / name for name in sorted(names)]


def _check_ties(model: Any) -> None:
    """Tied weights must be one parameter."""
    for one, other in model.all_tied_weights_keys.items():
        if model.get_parameter(one) is not model.get_parameter(other):
            raise Unfit(f"{one} and {other} are tied, and the files hold both")


def _without_promises(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters on the meta device, tied ones still tied; buffers in memory."""
    shapes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
            shape = shapes.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
            module.register_parameter(name, shape)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if isinstance(buffer, Promised):
                module._buffers[name] = buffer.rows_in(WHOLE)

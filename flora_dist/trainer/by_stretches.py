# SPDX-License-Identifier: Apache-2.0
"""A network of which a process has its stretches alone, made ready for ZeRO-3.

``deepspeed.zero.Init`` partitions a network module after module, so that a process holds one whole
module beside what it keeps. It is given zeros, and the weights are put into the partitions: whole
ones would have to be drawn on one process and sent. A partition's name, ``ds_tensor``, is that of
DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flora_dist.trainer.place import Rows, Unfit

TESTED = "0.19.8"
# Of "zero_optimization": a key, and what partitions are with it.
_OTHERWISE: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "zero_hpz_partition_size": (lambda size: size > 1, "are kept twice"),
    "mics_shard_size": (lambda size: size > 0, "are those of a few processes"),
    "offload_param": (lambda block: block.get("device") == "nvme", "are on disk"),
    "zero_quantized_nontrainable_weights": (bool, "are quantized where weights are frozen"),
}


def check_partitions(settings: Mapping[str, Any]) -> None:
    """Refuse settings of DeepSpeed with which a partition is no stretch of its parameter.

    Raises:
        Unfit: naming the key.
    """
    zero = settings.get("zero_optimization", {})
    for key, (is_on, what) in _OTHERWISE.items():
        if zero.get(key) is not None and is_on(zero[key]):
            raise Unfit(f"with zero_optimization.{key}={zero[key]!r} partitions {what}")


def partition_(
    model: nn.Module, stretches: Rows, settings: Mapping[str, Any], device: torch.device
) -> None:
    """Give a network that has no memory its partitions; all processes must call it.

    Args:
        model: on the meta device, but for its buffers.
        stretches: this process's, by name; freed by it.
        settings: DeepSpeed's config.
        device: that computes; buffers go there.

    Raises:
        RuntimeError: this version of DeepSpeed partitions parameters in another way.
    """
    import deepspeed

    deepspeed.init_distributed()  # without it Init takes this process for the only one
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_meta]
        for parameter in own:
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            filled = nn.Parameter(zeros, parameter.requires_grad)
            torch.utils.swap_tensors(parameter, filled)  # type: ignore[no-untyped-call]
        if own:
            # Of the module itself Init would take all that is below it too.
            alone = nn.ParameterList(own)
            deepspeed.zero.Init(module=alone, config_dict_or_path=dict(settings))
        for parameter in own:
            name = names[id(parameter)]
            _put(name, parameter, stretches.pop(name))
    assert not stretches, "every parameter has its module"


@torch.no_grad()
def _put(name: str, parameter: Any, stretch: Tensor) -> None:
    partition = getattr(parameter, "ds_tensor", None)
    wanted = -(-getattr(parameter, "ds_numel", 0) // dist.get_world_size())
    if partition is None or (partition.numel(), partition.dtype) != (wanted, stretch.dtype):
        import deepspeed

        found = None if partition is None else (partition.numel(), partition.dtype)
        raise RuntimeError(
            f"a partition of ZeRO-3 must be an equal share of its parameter, as in DeepSpeed "
            f"{TESTED}; that of {name!r} is {found} with DeepSpeed {deepspeed.__version__}, not "
            f"{(wanted, stretch.dtype)}. Use DeepSpeed {TESTED}."
        )
    partition.view(-1)[: stretch.numel()].copy_(stretch)  # the last may be padded

# SPDX-License-Identifier: Apache-2.0
"""What the ranks try together: a sum with a known answer, its time, and the bits of projections."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flora_dist.cluster.doctor.trial_sizes import LARGE_BYTES, SMALL_BYTES
from flora_dist.cluster.local_store import local_store
from flora_dist.core.sketch.keys import Purpose, derive_key, name_key
from flora_dist.core.sketch.matrices import sketch_matrix
from flora_dist.core.sketch.ops import compress
from flora_dist.world import interface_toward, is_of_this_machine, read_world

_SMALL_TIMES, _LARGE_TIMES = 21, 5
_BLOCK = 64
# Exact in float32 whatever the order of the sum, so in any library on any device: entries of A are
# 1/sqrt(16), x is whole numbers up to 7.
_RANK, _ROWS, _LARGEST = 16, 32, 7


def run(settings: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Join the group and try it.

    Args:
        settings: `device` cpu or cuda, `timeout_s` of the group, `seed` of the projections.
        say: is told how far this rank has come.
    """
    place = read_world(os.environ)
    device = torch.device("cpu")
    if settings["device"] == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    _choose_interface(str(place.address))
    timeout = timedelta(seconds=settings["timeout_s"])
    # The ranks of one machine meet where no other comes.
    local = is_of_this_machine(place.address)
    dist.init_process_group(
        backend,
        store=local_store(place, timeout) if local else None,
        rank=place.process_rank,
        world_size=place.size,
        timeout=timeout,
    )
    try:
        dist.barrier()
        say("group formed")
        result = {
            "wrong_sum": _wrong_sum(device),
            "small_s": _seconds(SMALL_BYTES, _SMALL_TIMES, device),
            "large_s": _seconds(LARGE_BYTES, _LARGE_TIMES, device),
            "projection": projections(int(settings["seed"]), device),
            "seed": int(settings["seed"]),
            "torch": torch.__version__,
            "nccl": _nccl(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return result


def projections(seed: int, device: torch.device) -> dict[str, str]:
    """Digests of sketch matrices and of a projection, on the CPU and on the device."""
    return {kind: _projection(seed, torch.device(kind)) for kind in {"cpu", device.type}}


def _projection(seed: int, device: torch.device) -> str:
    key = derive_key(seed=seed, name_key=name_key("doctor"), purpose=Purpose.MOMENTUM, window=0)
    found = hashlib.sha256()
    for kind in ("hadamard", "gaussian"):
        drawn = sketch_matrix(
            kind, key=key, rank=_RANK, block=_BLOCK, dtype=torch.float32, device=device
        )
        found.update(_bytes(drawn))
    sketch = sketch_matrix(
        "hadamard", key=key, rank=_RANK, block=_BLOCK, dtype=torch.float32, device=device
    )
    counted = torch.arange(_ROWS * _BLOCK, device=device) % (2 * _LARGEST + 1) - _LARGEST
    x_ENM = counted.to(torch.float32).view(1, _ROWS, _BLOCK)
    found.update(_bytes(compress(x_ENM, sketch.unsqueeze(0))))
    return found.hexdigest()[:12]


def _bytes(tensor: torch.Tensor) -> bytes:
    # numpy would be shorter; the package does without it.
    return bytes(tensor.cpu().contiguous().view(torch.uint8).flatten().tolist())


def _choose_interface(master: str) -> None:
    """The one toward process 0 where the environment names none, as flora_dist's launcher does."""
    interface = interface_toward(master)
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def _wrong_sum(device: torch.device) -> str | None:
    """An all-reduce whose answer is known: what is wrong with it, or None.

    Element i of rank r is (r + 1) (i mod 97 + 1): whole numbers, so the sum is exact, and another
    rank's part left out or counted twice cannot hide.
    """
    process_rank, size = dist.get_rank(), dist.get_world_size()
    pattern = (torch.arange(LARGE_BYTES // 4, device=device) % 97 + 1).to(torch.float32)
    summed = pattern * (process_rank + 1)
    dist.all_reduce(summed)
    expected = pattern * (size * (size + 1) / 2)
    wrong = int((summed != expected).sum())
    if not wrong:
        return None
    first = int((summed != expected).nonzero()[0])
    return (
        f"{wrong} of {summed.numel()} elements, the first at {first}: "
        f"{float(summed[first]):g} for {float(expected[first]):g}"
    )


def _seconds(size: int, times: int, device: torch.device) -> float:
    """Median seconds of an all-reduce of so many bytes."""
    payload = torch.zeros(size // 4, device=device)
    found = []
    for _ in range(times + 1):
        _wait_for(device)
        began = time.monotonic()
        dist.all_reduce(payload)
        _wait_for(device)
        found.append(time.monotonic() - began)
    return statistics.median(found[1:])  # the first one opens connections


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nccl() -> str | None:
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]

# SPDX-License-Identifier: Apache-2.0
"""Proves that files hold every element of every tensor once, before memory is made for them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from flora_dist.checkpoint.folder import Manifest

METADATA = ".metadata"
_MOST_DIMS = 16
"""A box has two corners a dim; canonical tensors have five dims at most."""
_ENVELOPE = 1 << 16
"""Bytes that torch.save may add to a box: a header, a pickle of its shape, alignment."""

Offsets = tuple[int, ...]


def tiles_exactly(shape: tuple[int, ...], boxes: Iterable[tuple[Offsets, Offsets]]) -> bool:
    """Whether boxes, (offsets, sizes) each, cover a tensor once: no gap and no overlap.

    A sum of boxes is given by its corners, each with the sign (-1)^(number of ends): the mixed
    difference of its indicator functions, from which summing gets them back. So the boxes cover the
    whole once just if all corners cancel but those of the whole. Sums of sizes prove less: two
    boxes at one place leave a gap elsewhere.

    >>> tiles_exactly((4, 2), [((0, 0), (1, 2)), ((1, 0), (3, 2))])
    True
    >>> tiles_exactly((4, 2), [((0, 0), (2, 2)), ((0, 0), (2, 2))])
    False
    """
    corners: Counter[Offsets] = Counter()
    whole = ((0,) * len(shape), shape)
    for sign, (offsets, sizes) in [(-1, whole), *((1, box) for box in boxes)]:
        ends = [((o, 1), (o + s, -1)) for o, s in zip(offsets, sizes, strict=True)]
        for corner in itertools.product(*ends):
            signs = math.prod(each for _, each in corner)
            corners[tuple(place for place, _ in corner)] += sign * signs
    return not any(corners.values())


def check_stored(metadata: Metadata, manifest: Manifest, where: Path) -> None:
    """Prove that files of the manifest hold every element of every tensor that it lists.

    Raises:
        ValueError: naming the tensor or file.
    """
    for key, facts in manifest.tensors.items():
        if 0 in facts.shape:  # DCP stores nothing of it
            continue
        stored = metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(_wrong(where, key, "is missing"))  # noqa: TRY004 - a file's fault
        found = (tuple(stored.size), str(stored.properties.dtype).removeprefix("torch."))
        listed = (facts.shape, facts.dtype)
        if found != listed:
            raise ValueError(_wrong(where, key, f"has {found}, the manifest {listed}"))
    for index, place in metadata.storage_data.items():
        if place.relative_path not in manifest.files:  # no hash would stand for it
            what = f"is in {place.relative_path!r}, which the manifest does not list"
            raise ValueError(_wrong(where, index.fqn, what))
    check_boxes(metadata, {name: facts.bytes for name, facts in manifest.files.items()}, where)


def check_boxes(metadata: Metadata, sizes: Mapping[str, int], where: Path) -> None:
    """Prove that each tensor is covered once, by boxes that files of those sizes have room for.

    Raises:
        ValueError: naming the tensor; or the file, if its boxes share bytes or leave many unused.
    """
    held: Counter[str] = Counter()
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue
        _check_covered(key, stored, where)
        for chunk in (chunk for chunk in stored.chunks if 0 not in chunk.sizes):
            place = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if place is None:
                raise ValueError(_wrong(where, key, f"has no bytes at {tuple(chunk.offsets)}"))
            need = math.prod(chunk.sizes) * stored.properties.dtype.itemsize
            file, size = place.relative_path, sizes.get(place.relative_path, 0)
            fits = place.offset + place.length <= size
            if not fits or not need <= place.length <= need + _ENVELOPE:
                what = (
                    f"needs {need} bytes; it has {place.length} from {place.offset} in {file!r}, "
                    f"which has {size}"
                )
                raise ValueError(_wrong(where, key, what))
    for place in metadata.storage_data.values():
        held[place.relative_path] += place.length
    for name, size in sizes.items():
        if name != METADATA and not held[name] <= size <= held[name] + _ENVELOPE:
            raise ValueError(
                f"a checkpoint's files must hold what its metadata lists; '{where / name}' has "
                f"{size} bytes, its boxes together {held[name]}. Load another checkpoint."
            )


def _check_covered(key: str, stored: TensorStorageMetadata, where: Path) -> None:
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]
    shape = tuple(stored.size)
    if len(shape) > _MOST_DIMS:
        raise ValueError(_wrong(where, key, f"has {len(shape)} dims, more than {_MOST_DIMS}"))
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        raise ValueError(_wrong(where, key, "has gaps"))
    if not tiles_exactly(shape, boxes):
        raise ValueError(_wrong(where, key, "has elements twice, and gaps"))


def _wrong(where: Path, key: str, what: str) -> str:
    return (
        f"a checkpoint's files must hold what its manifest lists; {key!r} of '{where}' {what}. "
        "Load another checkpoint."
    )

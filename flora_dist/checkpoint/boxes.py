# SPDX-License-Identifier: Apache-2.0
"""Canonical tensors as torch's DCP knows them: it stores boxes once and reads any others from them.

The only file that knows DCP's private protocol ``_Checkpointable``, by whose three methods it asks
an object for its boxes (torch 2.5 and later).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from flora_dist.checkpoint.canonical import Box
from flora_dist.checkpoint.metadata import read_metadata


@dataclass(frozen=True, eq=False, kw_only=True)
class Boxes:
    """What a rank holds of one canonical tensor."""

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    boxes: Sequence[Box]
    """At distinct offsets."""
    _places: dict[tuple[int, ...], Box] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for box in self.boxes:
            assert box.offsets not in self._places, f"two boxes at {box.offsets}"
            self._places[box.offsets] = box

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, boxes: Sequence[Box]) -> Boxes:
        """Without empty boxes, which DCP would store."""
        return cls(shape=shape, dtype=dtype, boxes=[b for b in boxes if b.values.numel()])

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        return [self._write_item(key, box) for box in self.boxes]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._places[tuple(index.offset)].values

    def _write_item(self, key: str, box: Box) -> WriteItem:
        return WriteItem(
            index=MetadataIndex(key, torch.Size(box.offsets)),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=_chunk(box),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.shape),
            ),
        )


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=box.values.size())


class BoxSavePlanner(DefaultSavePlanner):
    """DCP's own on a flat dict: replicas save equal boxes once, spread over the ranks."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """What is written for an item."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)  # type: ignore[no-any-return]


class BoxReader(FileSystemReader):
    """DCP's reader of files, without its unpickling of ``.metadata``."""

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        """Where each box stands in the files."""
        metadata = read_metadata(Path(self.path) / ".metadata")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class BoxPlanner(LoadPlanner):
    """Reads boxes out of a checkpoint; bytes, which DCP would unpickle, are refused."""

    def set_up_planner(
        self,
        state_dict: Mapping[str, Boxes],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take what is to be read, and what there is."""
        del is_coordinator
        assert metadata is not None
        self._boxes, self._metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        """The stored boxes, or parts of them, that fill this rank's."""
        items: list[ReadItem] = []
        for key, boxes in self._boxes.items():
            if not boxes.boxes:  # nothing of it is here, or anywhere
                continue
            stored = self._metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata), key
            items += create_read_items_for_chunk_list(key, stored, boxes.__create_chunk_list__())
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing more: each rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing more."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never asked: there are no bytes in the plan."""
        raise AssertionError(f"no bytes are asked for; got {value} for {read_item}")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of this rank's box that an item fills."""
        index = read_item.dest_index
        target = self._boxes[index.fqn].__get_tensor_shard__(index)
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was read in place."""

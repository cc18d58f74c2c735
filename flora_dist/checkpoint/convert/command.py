# SPDX-License-Identifier: Apache-2.0
"""Conversions between checkpoint forms: one process, no GPU, the whole state in memory.

Read are DeepSpeed's own folders, vanilla folders of torch's DCP, and ours; written are ours, or one
file for a plain run. Nothing is unpickled freely.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flora_dist.checkpoint.convert.dcp import read_dcp
from flora_dist.checkpoint.convert.deepspeed import MODEL_FILES, read_deepspeed
from flora_dist.checkpoint.convert.whole import Whole, read_whole, write_file, write_whole
from flora_dist.checkpoint.manifest import NAME
from flora_dist.checkpoint.names import lost_link
from flora_dist.checkpoint.pointer import read_pointer

_FOREIGN = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(MemoryError, RuntimeError, TypeError),
)
"""What Python raises on structures that are not what they should be."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion has done."""

    path: Path
    """What was written."""
    form: str
    """Of the source."""
    step: int
    left_out: tuple[str, ...]
    """What the source had and the result has not."""


def convert(source: str | Path, target: str | Path) -> Converted:
    """Read a checkpoint of any known form and write it anew.

    Args:
        source: a folder that ``engine.save_checkpoint`` of DeepSpeed wrote (or one tag in it), one
            of ``dcp.save({"model": ..., "optimizer": ...})`` from ``get_state_dict``, or of ours.
        target: a folder of checkpoints, for ``flora_dist.checkpoint.load`` and
            ``flora_dist.deepspeed.load_checkpoint``; or a name that ends in .pt: one file
            ``{"model", "optimizer", "step", "extra"}`` for a plain run. Of tied parameters ours
            knows the first name alone: load such a model with ``strict=False``.

    Raises:
        ValueError: a source of another form or optimizer, or damaged; a target that is there.
    """
    source, target = Path(source), Path(target)
    if target.suffix == ".pt" and target.exists():
        raise ValueError(
            f"a conversion does not overwrite files; '{target}' exists. Name another file."
        )
    with _told(source, (*_FOREIGN, ValueError)):
        form, whole = _read(source)
    with _told(source, _FOREIGN):
        path = write_file(whole, target) if target.suffix == ".pt" else write_whole(whole, target)
    return Converted(path=path, form=form, step=whole.step, left_out=whole.left_out)


@contextmanager
def _told(source: Path, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """What no check of ours has found, in any of a hundred places: a key, a kind, a size."""
    try:
        yield
    except kinds as error:
        if isinstance(error, ValueError) and str(source) in str(error):
            raise
        raise ValueError(
            f"a checkpoint to convert must be complete and unchanged; reading '{source}' failed: "
            f"{type(error).__name__}: {error}. Copy all files of one save again."
        ) from error


def _read(source: Path) -> tuple[str, Whole]:
    for place in _places(source):
        if (place / NAME).exists():
            return "flora_dist", read_whole(place)
        if (place / ".metadata").exists():
            return "torch DCP", read_dcp(place)
        if any(place.glob(MODEL_FILES)):
            return "DeepSpeed", read_deepspeed(place)
    if what := lost_link(source):
        raise ValueError(f"a source must be a folder; '{source}' {what}. Name one that exists.")
    raise ValueError(
        "a source must be a folder that DeepSpeed, torch.distributed.checkpoint or flora_dist has "
        f"written; '{source}' holds none of their files. Name a checkpoint or its folder."
    )


def _places(source: Path) -> Iterable[Path]:
    """The folder itself, then what its ``latest`` names."""
    yield source
    pointer = read_pointer(source)
    if pointer is not None:
        yield source / pointer.tag

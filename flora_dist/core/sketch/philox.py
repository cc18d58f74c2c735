# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 in integer tensor operations, and grids of random bits that any rank can slice.

Every value is a pure function of (key, row, column, number of columns), in integers only, so a
value has the same bits on CPU and CUDA, in any order and for any slice. `torch.Generator` cannot
give that: its CPU and CUDA streams differ, and a slice needs everything drawn before it.

The layout of the counter is a fixed part of the format:

    words 0, 1   low and high 32 bits of the index of the counter in the grid
    word 2       the stream: what the bits are used for, so one key serves several grids
    word 3       zero
"""

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3 (multipliers
# of Philox4x32 and the Weyl increments of its key).
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
_MASK_32 = 0xFFFFFFFF

_INTEGERS_PER_COUNTER = 8
_SIGNS_PER_COUNTER = 128

# About 100 passes are made over six int64 word tensors. On a CPU they should stay in cache (1.5 MiB
# at 32 Ki counters), yet be long enough to hide the cost of a call: 32 Ki measured 5 ns per 16-bit
# integer on one core, 8 Ki 9 ns. On a GPU a chunk only bounds the temporary memory.
_CPU_CHUNK = 1 << 15
_GPU_CHUNK = 1 << 22


class Stream(enum.IntEnum):
    """Word 2 of the counter; the numbers are a fixed part of the format."""

    INTEGERS = 0
    SIGNS = 1
    ROW_DRAWS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Counters of a grid: for each key some rows of as many that follow each other."""

    keys: Sequence[int]
    """64-bit."""
    first: int
    """Index of the first one."""
    count: int
    """In each row."""
    rows: int = 1
    stride: int = 0
    """From a row's first one to the next row's."""
    stream: Stream


Drawer = Callable[[Counters, torch.device], Tensor]
"""Words of counters, key after key and row after row, as int64 (keys rows count, 2): the lowest
words in the low halves."""
_drawers: dict[str, Drawer] = {}


def draw_by(device_type: str, drawer: Drawer) -> None:
    """Let compiled code draw on such devices; its bits must be those of ``drawn_by_torch``."""
    _drawers[device_type] = drawer


def philox_4x32_10(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Encrypts 128-bit counters with a 64-bit key by ten Philox rounds.

    Source: Salmon et al., SC 2011, section 3.3; equal to the Random123 known answers.

    Args:
        counter: int64 (..., 4), words in [0, 2^32), the lowest word first.
        key: the two key words in [0, 2^32), the low one first.

    Returns:
        int64 (..., 4), words in [0, 2^32), uniform and independent across counters.

    >>> [f"{w:08x}" for w in philox_4x32_10(torch.zeros(4, dtype=torch.int64), (0, 0)).tolist()]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    words = [word.clone(memory_format=torch.contiguous_format) for word in counter.unbind(-1)]
    return torch.stack(_encrypt_(words, key), dim=-1)


def grid16(
    key: int,
    *,
    rows: tuple[int, int],
    columns: tuple[int, int],
    num_columns: int,
    device: torch.device | str,
) -> Tensor:
    """Draws 16-bit integers for a rectangle of the element grid of a matrix.

    Element (i, j) is half number e % 8 (low half of a word first) of the counter e // 8, where
    e = i * stride + j and stride is `num_columns` padded up to a multiple of 8.

    Args:
        key: 64-bit key, see `flora_dist.core.sketch.keys.derive_key`.
        rows: first row and the row after the last.
        columns: first column and the column after the last, within `num_columns`.
        num_columns: columns of the whole matrix.
        device: where the result is made; its bits do not depend on it.

    Returns:
        int32 (rows, columns), values in [0, 65536).
    """

    def unpack_(out: Tensor, packed: Tensor) -> None:
        # uint16 is read in the order of memory: the low half first on little-endian machines,
        # which are all that torch is built for with a GPU.
        out.copy_(packed.view(torch.uint16))

    out = torch.empty(0, _INTEGERS_PER_COUNTER, dtype=torch.int32, device=device)
    return _grid(key, Stream.INTEGERS, out, unpack_, rows, columns, num_columns)


def grid_signs(
    key: int,
    *,
    rows: tuple[int, int],
    columns: tuple[int, int],
    num_columns: int,
    device: torch.device | str,
) -> Tensor:
    """Draws signs for a rectangle of the element grid of a matrix.

    As `grid16` with 128 signs per counter and the stride padded to a multiple of 128: a set bit
    is -1, the lowest bit of the lowest word first.

    Args:
        key: 64-bit key, see `flora_dist.core.sketch.keys.derive_key`.
        rows: first row and the row after the last.
        columns: first column and the column after the last, within `num_columns`.
        num_columns: columns of the whole matrix.
        device: where the result is made; its bits do not depend on it.

    Returns:
        int8 (rows, columns), values -1 and +1.
    """
    out = torch.empty(0, _SIGNS_PER_COUNTER, dtype=torch.int8, device=device)
    return _grid(key, Stream.SIGNS, out, _unpack_signs_, rows, columns, num_columns)


def draws63(key: int, *, count: int) -> Tensor:
    """Draws 63-bit integers on the CPU, two per counter: draw d is half d % 2 of counter d // 2.

    Args:
        key: 64-bit key, see `flora_dist.core.sketch.keys.derive_key`.
        count: how many.

    Returns:
        int64 (count,), values in [0, 2^63).
    """
    return draws63_of_each([key], count=count)[0]


def draws63_of_each(keys: Sequence[int], *, count: int) -> Tensor:
    """As `draws63`, of many keys in one pass: (keys, count)."""
    counters = Counters(keys=keys, first=0, count=-(-count // 2), stream=Stream.ROW_DRAWS)
    packed = _drawn(counters, torch.device("cpu"))
    return packed.bitwise_and_((1 << 63) - 1).view(len(keys), -1)[:, :count]


def row_signs_of_each(keys: Sequence[int], *, count: int, device: torch.device | str) -> Tensor:
    """As row 0 of `grid_signs`, `count` columns of as many, of many keys in one pass.

    Returns:
        int8 (keys, count), values -1 and +1.
    """
    per_key = -(-count // _SIGNS_PER_COUNTER)
    counters = Counters(keys=keys, first=0, count=per_key, stream=Stream.SIGNS)
    signs = torch.empty(len(keys) * per_key, _SIGNS_PER_COUNTER, dtype=torch.int8, device=device)
    _unpack_signs_(signs, _drawn(counters, signs.device))
    return signs.view(len(keys), -1)[:, :count]


def _grid(
    key: int,
    stream: Stream,
    out: Tensor,
    unpack_: Callable[[Tensor, Tensor], None],
    rows: tuple[int, int],
    columns: tuple[int, int],
    num_columns: int,
) -> Tensor:
    """Unpacks the counters that a rectangle touches into a tensor like `out` (0, per counter)."""
    assert 0 <= rows[0] <= rows[1], rows
    assert 0 <= columns[0] <= columns[1] <= num_columns, (columns, num_columns)
    per_counter = out.shape[1]
    counters_per_row = -(-num_columns // per_counter)
    first, stop = columns[0] // per_counter, -(-columns[1] // per_counter)
    touched, height = stop - first, rows[1] - rows[0]
    out = out.new_empty(height * touched, per_counter)
    for row, start, count, width in _chunks(height, touched, out.device):
        counters = Counters(
            keys=(key,),
            first=(rows[0] + row) * counters_per_row + first + start,
            count=width,
            rows=count,
            stride=counters_per_row,
            stream=stream,
        )
        position = row * touched + start
        unpack_(out[position : position + count * width], _drawn(counters, out.device))
    skip = columns[0] - first * per_counter
    grid = out.view(height, touched * per_counter)
    return grid[:, skip : skip + columns[1] - columns[0]].contiguous()


def _chunks(height: int, width: int, device: torch.device) -> Iterator[tuple[int, int, int, int]]:
    """Cuts a rectangle of counters into (first row, first column, rows, columns), in memory order.

    A chunk is some whole rows or a part of one row, so that it is one piece of memory.
    """
    chunk = _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK
    step = max(1, chunk // max(1, width))
    for row in range(0, height, step):
        for start in range(0, width, chunk):
            yield row, start, min(step, height - row), min(chunk, width - start)


def _drawn(counters: Counters, device: torch.device) -> Tensor:
    """The words of counters as int64 (keys rows count, 2), by whoever draws on this device."""
    assert all(0 <= key < 1 << 64 for key in counters.keys), counters.keys
    return _drawers.get(device.type, drawn_by_torch)(counters, device)


def drawn_by_torch(counters: Counters, device: torch.device) -> Tensor:
    """The same by torch's operators, on any device."""
    halves = [[key & _MASK_32 for key in counters.keys], [key >> 32 for key in counters.keys]]
    index = torch.arange(counters.count, dtype=torch.int64, device=device)
    if counters.rows > 1:
        down = torch.arange(counters.rows, dtype=torch.int64, device=device) * counters.stride
        index = (down.unsqueeze(-1) + index).flatten()
    index += counters.first
    if len(counters.keys) == 1:
        return _packed(_encrypt_(_counter(index, counters.stream), (halves[0][0], halves[1][0])))
    low, high = torch.tensor(halves, dtype=torch.int64, device=device).repeat_interleave(
        len(index), 1
    )
    index = index.repeat(len(counters.keys))
    return _packed(_encrypt_(_counter(index, counters.stream), (low, high)))


def _counter(index: Tensor, stream: Stream) -> list[Tensor]:
    return [
        index & _MASK_32,
        index >> 32,
        torch.full_like(index, int(stream)),
        torch.zeros_like(index),
    ]


def _unpack_signs_(out: Tensor, packed: Tensor) -> None:
    bit = torch.arange(8, dtype=torch.uint8, device=out.device)
    octets = packed.view(torch.uint8).unsqueeze(-1)
    out.copy_(((octets >> bit) & 1).flatten(1)).mul_(-2).add_(1)


def _packed(words: list[Tensor]) -> Tensor:
    """Words (n,) each as int64 (n, 2): two 32-bit words in one integer, the low one first."""
    packed = words[0].new_empty(len(words[0]), 2)
    for pair in range(2):
        low, high = words[2 * pair], words[2 * pair + 1]
        torch.bitwise_left_shift(high, 32, out=packed[:, pair]).bitwise_or_(low)
    return packed


def _encrypt_(words: list[Tensor], key: tuple[int, int] | tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds on four separate word tensors, which are overwritten; one key, or one for each.

    One round, in 32-bit words:
        x0, x1, x2, x3 <- hi(M1 x2) ^ x1 ^ k0, lo(M1 x2), hi(M0 x0) ^ x3 ^ k1, lo(M0 x0)

    The 64-bit products wrap in int64, which keeps their bits. x1 and x3 keep the whole product:
    only the word it is xor-ed into is masked, which saves two masks in each round.
    """
    x0, x1, x2, x3 = words
    spare_0, spare_1 = torch.empty_like(x0), torch.empty_like(x0)
    for step in range(_ROUNDS):
        key_0 = (key[0] + step * _WEYL_0) & _MASK_32
        key_1 = (key[1] + step * _WEYL_1) & _MASK_32
        product_0 = torch.mul(x0, _MULTIPLIER_0, out=spare_0)
        product_1 = torch.mul(x2, _MULTIPLIER_1, out=spare_1)
        torch.bitwise_right_shift(product_1, 32, out=x0)
        x0.bitwise_xor_(x1).bitwise_xor_(key_0).bitwise_and_(_MASK_32)
        torch.bitwise_right_shift(product_0, 32, out=x2)
        x2.bitwise_xor_(x3).bitwise_xor_(key_1).bitwise_and_(_MASK_32)
        x1, spare_1 = product_1, x1
        x3, spare_0 = product_0, x3
    return [x0, x1.bitwise_and_(_MASK_32), x2, x3.bitwise_and_(_MASK_32)]

# SPDX-License-Identifier: Apache-2.0
"""64-bit keys for random bits, from the seed of a run and the canonical name of a parameter.

Every rank derives the same keys with no message. Python's `hash` is never used: it is salted, so
two processes would disagree.
"""

import enum
import hashlib
import struct

# Components that wrappers put into the names of parameters: DDP and DeepSpeed, torch.compile,
# FSDP1, activation checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class Purpose(enum.IntEnum):
    """What the bits of a key are used for; the numbers are a fixed part of the format."""

    MOMENTUM = 1
    """Sketch of the momentum; one window lasts `kappa` steps."""
    GRADIENT = 2
    """Sketch of accumulated gradients; one window lasts one step."""
    ROUND_WEIGHT = 3
    """Stochastic rounding of weights; one window lasts one step."""
    ROUND_MOMENTUM = 4
    """Stochastic rounding of momentum; one window lasts one step."""
    ROUND_GRADIENT = 5
    """Stochastic rounding of a rank's sums of gradients; one window lasts one step, the matrix is
    the rank's place and the micro-batch."""
    ROUND_MEAN = 6
    """Stochastic rounding of the mean of sketched gradients; one window lasts one step."""


def canonical_name(name: str) -> str:
    """Removes from a parameter's name what wrappers added to it.

    Args:
        name: dotted name, as `named_parameters()` of a wrapped or plain model gives it.

    Returns:
        The name without wrapper components; the name itself where nothing else would remain.

    >>> canonical_name("module._orig_mod.layers.0._fsdp_wrapped_module.weight")
    'layers.0.weight'
    """
    kept = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(kept) if kept else name


def name_key(name: str) -> int:
    """First 64 bits of SHA-256 of the canonical name in UTF-8, as one big-endian integer.

    Args:
        name: dotted name of a parameter, wrapped or not.
    """
    return _first_64_bits(canonical_name(name).encode())


def derive_key(*, seed: int, name_key: int, purpose: Purpose, window: int, matrix: int = 0) -> int:
    """Hashes what identifies a draw into the 64-bit key of its random bits.

    The key is the first 64 bits of SHA-256 of the five numbers as little-endian 64-bit integers.

    Args:
        seed: the seed of the run, one for all ranks.
        name_key: from `name_key`, or the position of a parameter without a name.
        purpose: what the bits are used for.
        window: which draw in time, counted as `purpose` says.
        matrix: index in a batch of matrices (experts).

    Returns:
        A key in [0, 2^64).

    Raises:
        ValueError: if the seed needs more than 64 bits with its sign.
    """
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must lie in [-2^63, 2^63); got seed={seed}. Take it modulo 2^63.")
    assert 0 <= name_key < 1 << 64, name_key
    return _first_64_bits(struct.pack("<qQqqq", seed, name_key, purpose, window, matrix))


def _first_64_bits(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")

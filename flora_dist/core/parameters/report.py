# SPDX-License-Identifier: Apache-2.0
"""What is compressed, what is dense and why, and what this rank keeps for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from flora_dist.columns import aligned

ADAMW_BYTES = 8
"""Bytes per element that AdamW keeps: two fp32 moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """One parameter on this rank."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    role: str
    """What it is to the model by its name: head, embedding, value or other."""
    how: str
    """Compressed how, or dense and why."""
    is_compressed: bool
    local_elements: int
    """Elements of the parameter on this rank."""
    state_bytes: int
    """Bytes of Flora's state tensors on this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All parameters of an optimizer on this rank; ``str()`` is a table."""

    level: str
    """What of the gradients is compressed: dense means nothing."""
    rows: tuple[ReportRow, ...]
    unnamed: int
    """Parameters known by position only, since the optimizer was given no names."""
    kernels: str
    """What steps them: compiled kernels or torch's operators, and what to do about the latter."""

    @property
    def state_bytes(self) -> int:
        """Bytes of all state tensors on this rank."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes that AdamW with fp32 moments would keep for the same elements."""
        return ADAMW_BYTES * sum(row.local_elements for row in self.rows)

    @property
    def bytes_per_compressed_element(self) -> float:
        """State bytes of compressed parameters over their elements, on this rank."""
        rows = [row for row in self.rows if row.is_compressed]
        elements = sum(row.local_elements for row in rows)
        return sum(row.state_bytes for row in rows) / elements if elements else 0.0

    def summary(self) -> str:
        """A few lines: totals, and parameters of one kind on one line."""
        elements = sum(row.local_elements for row in self.rows)
        lines = [
            f"Flora, gradients={self.level}: {elements:,} elements here, state "
            f"{self.state_bytes:,} bytes against AdamW's {self.adamw_bytes:,}"
        ]
        if self.unnamed:
            lines.append(
                f"  {self.unnamed} parameters have no names: projections depend on their "
                "positions. Pass model.named_parameters()."
            )
        lines += [f"  {how}: {names}" for how, names in self._kinds()]
        lines.append(f"  kernels: {self.kernels}")
        return "\n".join(lines)

    def _kinds(self) -> Iterator[tuple[str, str]]:
        kinds: dict[str, dict[str, int]] = {}
        for row in self.rows:
            names = kinds.setdefault(row.how, {})
            pattern = re.sub(r"\d+", "*", row.name)
            names[pattern] = names.get(pattern, 0) + 1
        for how, patterns in kinds.items():
            yield (
                how,
                ", ".join(f"{p} ({n})" if n > 1 else p for p, n in patterns.items()),
            )

    def __str__(self) -> str:
        table = [("parameter", "shape", "role", "how", "state bytes", "AdamW")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            adamw = f"{ADAMW_BYTES * row.local_elements:,}"
            table.append((row.name, shape, row.role, row.how, f"{row.state_bytes:,}", adamw))
        table.append(("all", "", "", "", f"{self.state_bytes:,}", f"{self.adamw_bytes:,}"))
        return aligned(table, left=4)

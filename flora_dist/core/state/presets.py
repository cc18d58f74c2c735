# SPDX-License-Identifier: Apache-2.0
"""Settings of published optimizers, as arguments of ``Flora``. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER: Mapping[str, Any] = {
    "block": "full",
    "sketch": "gaussian",
    "momentum": "flora",
    "transfer": "paper",
    "kappa": 1000,
    "scale_parameter": True,
    "state_dtype": "float32",
}
"""The authors' algorithm."""
SCALE: Mapping[str, Any] = {
    "momentum": "vectors",
    "normalise": "rows",
    "beta2": 0.999,
    "clip": None,
    "roles": {
        "embedding": {"normalise": "columns"},
        "head": {"momentum": "flora", "rank": None},
    },
}
"""SCALE (Glentis et al., arXiv 2506.16659): matrices are divided by the norms of their outputs, the
head has momentum, 1-D parameters have Adam. Outputs are rows; of an embedding, columns."""
RACS: Mapping[str, Any] = {
    "momentum": "vectors",
    "normalise": "racs",
    "beta2": 0.9,
    "clip": None,
    "growth": 1.01,
}
"""RACS (Gong et al., arXiv 2502.07752, section on RACS): rows and columns scaled, no momentum, and
the growth of updates limited."""
APOLLO: Mapping[str, Any] = {
    "momentum": "apollo",
    "beta2": 0.999,
    "clip": None,
    "growth": 1.01,
    "kappa": 200,
}
"""APOLLO (Zhu et al., arXiv 2412.05270): Adam in the sketch scales the gradient, and the growth of
updates is limited; a new projection every 200 steps."""

# SPDX-License-Identifier: Apache-2.0
"""The version, where every layer may read it; equal to pyproject.toml's."""

__version__ = "0.2.0"

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that any layout and number of processes can load: save, save_async, load, latest."""

from flora_dist.checkpoint.api import Loaded, Saving, latest, load, save, save_async

__all__ = ["Loaded", "Saving", "latest", "load", "save", "save_async"]

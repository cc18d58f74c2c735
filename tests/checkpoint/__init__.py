# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: saved whole, loaded whole or not at all, on any layout."""

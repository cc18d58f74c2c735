# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other formats, and of ours into others."""

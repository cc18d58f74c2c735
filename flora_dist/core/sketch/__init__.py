# SPDX-License-Identifier: Apache-2.0
"""Sketches: random bits, keys, sketch matrices, and what is done with them on plain tensors."""

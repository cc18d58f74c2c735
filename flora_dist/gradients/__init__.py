# SPDX-License-Identifier: Apache-2.0
"""Gradients kept as sketches from backward to step, on every layout."""

# SPDX-License-Identifier: Apache-2.0
"""Ranks compare what must be equal on all of them."""

# SPDX-License-Identifier: Apache-2.0
"""Settings of a group and the list of state tensors; no torch."""

# SPDX-License-Identifier: Apache-2.0
"""Which tensors are stepped, their names, state and report."""

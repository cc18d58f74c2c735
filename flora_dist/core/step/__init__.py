# SPDX-License-Identifier: Apache-2.0
"""One step: planned, measured, summed, finished."""

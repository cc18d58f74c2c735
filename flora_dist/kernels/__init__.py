# SPDX-License-Identifier: Apache-2.0
"""The step's phases as compiled kernels, and which batches they step."""

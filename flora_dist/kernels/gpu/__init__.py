# SPDX-License-Identifier: Apache-2.0
"""The step's phases as Triton kernels for CUDA tensors; imported where some are stepped."""

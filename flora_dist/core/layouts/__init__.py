# SPDX-License-Identifier: Apache-2.0
"""How a rank holds parameters: one file per kind, each giving plain local tensors."""

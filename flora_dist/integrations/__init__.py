# SPDX-License-Identifier: Apache-2.0
"""One file per host framework: how it holds parameters, told to the optimizer as a layout."""

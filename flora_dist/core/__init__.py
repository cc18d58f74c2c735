# SPDX-License-Identifier: Apache-2.0
"""The optimizer's parts: parameters, the step, sketches, layouts, messages."""

# SPDX-License-Identifier: Apache-2.0
"""One rank's arithmetic on plain tensors: settings, state tensors, rules and the step's phases."""

# SPDX-License-Identifier: Apache-2.0
"""Programs for several hosts: launch, doctor, planner."""

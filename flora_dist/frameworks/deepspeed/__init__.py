# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's engines, ZeRO 0 to 3."""

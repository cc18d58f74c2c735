# SPDX-License-Identifier: Apache-2.0
"""Flora under DeepSpeed ZeRO, on engines that real launchers started."""
